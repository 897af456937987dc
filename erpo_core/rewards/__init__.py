"""Rewards with verifiable answers: finding the boxed answer, checking it, scoring completions."""
