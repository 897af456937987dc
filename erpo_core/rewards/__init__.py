"""Verifiable rewards: boxed answers, checked by a process that can be killed."""
