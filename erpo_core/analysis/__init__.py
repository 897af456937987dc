"""Analyses of token entropies."""
