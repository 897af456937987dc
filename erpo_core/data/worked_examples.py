"""Solved problems for the prompt: they show a small model the form of an answer."""

from erpo_core.specs.common import WorkedExample

ARITHMETIC: tuple[WorkedExample, ...] = (
    WorkedExample(problem="What is 4 + 3?", solution="4 + 3 = 7. The answer is \\boxed{7}."),
    WorkedExample(problem="What is 9 - 5?", solution="9 - 5 = 4. The answer is \\boxed{4}."),
)
"""Sums and differences of two numbers, as ``reasoning-gym:chain_sum`` asks for them."""
