"""Procedural tasks of the package reasoning-gym: their names, for the API, and their problems, for the workers."""

import importlib.util
import re
from dataclasses import fields
from typing import Any

from erpo_core.data.formats import Problem, is_answer
from erpo_core.errors import DatasetError, RunError, SpecError, UnknownReferenceError

# reasoning-gym 0.1.25; the API image does not install the package. A test compares the two.
TASKS = frozenset(
    [
        "ab",
        "acre",
        "advanced_geometry",
        "aiw",
        "arc_1d",
        "arc_agi",
        "base_conversion",
        "basic_arithmetic",
        "bf",
        "binary_alternation",
        "binary_matrix",
        "bitwise_arithmetic",
        "boxnet",
        "caesar_cipher",
        "calendar_arithmetic",
        "chain_sum",
        "circuit_logic",
        "codeio",
        "coin_flip",
        "color_cube_rotation",
        "complex_arithmetic",
        "composite",
        "count_bits",
        "count_primes",
        "countdown",
        "course_schedule",
        "cryptarithm",
        "decimal_arithmetic",
        "decimal_chain_sum",
        "dice",
        "emoji_mystery",
        "family_relationships",
        "figlet_font",
        "fraction_simplification",
        "futoshiki",
        "game_of_life",
        "game_of_life_halting",
        "gcd",
        "graph_color",
        "group_anagrams",
        "gsm_symbolic",
        "intermediate_integration",
        "isomorphic_strings",
        "jugs",
        "kakurasu",
        "knight_swap",
        "knights_knaves",
        "largest_island",
        "lcm",
        "leg_counting",
        "letter_counting",
        "letter_jumble",
        "list_functions",
        "mahjong_puzzle",
        "manipulate_matrix",
        "maze",
        "mini_sudoku",
        "modulo_grid",
        "n_queens",
        "needle_haystack",
        "number_filtering",
        "number_format",
        "number_sequence",
        "number_sorting",
        "palindrome_generation",
        "palindrome_partitioning",
        "path_star",
        "polynomial_equations",
        "polynomial_multiplication",
        "pool_matrix",
        "power_function",
        "prime_factorization",
        "products",
        "propositional_logic",
        "puzzle24",
        "quantum_lock",
        "ransom_note",
        "rearc",
        "rectangle_count",
        "rotate_matrix",
        "rotten_oranges",
        "rubiks_cube",
        "rush_hour",
        "self_reference",
        "sentence_reordering",
        "shortest_path",
        "simple_equations",
        "simple_geometry",
        "simple_integration",
        "sokoban",
        "spell_backward",
        "spiral_matrix",
        "string_insertion",
        "string_manipulation",
        "string_splitting",
        "string_synthesis",
        "sudoku",
        "survo",
        "syllogism",
        "time_intervals",
        "tower_of_hanoi",
        "tsumego",
        "word_ladder",
        "word_sequence_reversal",
        "word_sorting",
        "zebra_puzzles",
    ]
)
DEFAULT_SIZE = 500
MAX_SIZE = 100_000
_ARITHMETIC = re.compile(r"State the final answer to the following arithmetic problem: (.+?) =")


def check_task(task: str, args: dict[str, Any], *, pointer: str = "/dataset") -> int:
    """Refuse an unknown task, and arguments that it does not take where the package is there to ask.

    Returns:
        The number of problems.

    Raises:
        UnknownReferenceError: no such task.
        SpecError: an argument's name or value.
    """
    size = args.get("size", DEFAULT_SIZE)
    if type(size) is not int or not 1 <= size <= MAX_SIZE:
        raise SpecError(f"size is {size!r}", pointer=pointer, mend=f"write a size from 1 to {MAX_SIZE}")
    installed = importlib.util.find_spec("reasoning_gym") is not None
    if task not in (_registry() if installed else TASKS):
        raise UnknownReferenceError(
            f"reasoning-gym has no task {task!r}",
            pointer=pointer,
            mend=f"name one of {', '.join(sorted(TASKS))}",
            code="unknown_dataset",
        )
    if installed:
        _check_args(task, args, pointer)
    return size


def load_task(task: str, args: dict[str, Any]) -> list[Problem]:
    """The task's problems; the same arguments give the same problems.

    Raises:
        UnknownReferenceError, SpecError: as :func:`check_task`.
        RunError: ``dataset_unavailable``: the package is not installed.
        DatasetError: the task has no single answer to compare with.
    """
    check_task(task, args)
    if importlib.util.find_spec("reasoning_gym") is None:
        raise RunError("reasoning-gym is not installed: pip install reasoning-gym", code="dataset_unavailable")
    import reasoning_gym

    args = {"size": DEFAULT_SIZE, "seed": 0, **args}
    try:
        rows = list(reasoning_gym.create_dataset(task, **args))
    except Exception as error:  # each task validates in its own way
        raise DatasetError(f"reasoning-gym:{task} fails with {args}: {error}", pointer="/dataset") from error
    return [_problem(task, args["seed"], index, row) for index, row in enumerate(rows)]


def _problem(task: str, seed: int, index: int, row: dict[str, Any]) -> Problem:
    answer = row.get("answer")
    if answer is None or not is_answer(str(answer)):
        raise DatasetError(
            f"reasoning-gym:{task} gives no single answer to its problem {index}",
            pointer="/dataset",
            mend="choose a task whose problems have one answer, for example chain_sum",
        )
    return Problem(id=f"{task}/{seed}/{index}", problem=plain_question(row["question"]), answer=str(answer).strip())


def plain_question(question: str) -> str:
    """A bare arithmetic expression asked as a person would; any other question as it is."""
    found = _ARITHMETIC.fullmatch(question.strip())
    return f"What is {found[1]}?" if found else question


def _registry() -> dict[str, Any]:
    from reasoning_gym.factory import DATASETS

    return DATASETS


def _check_args(task: str, args: dict[str, Any], pointer: str) -> None:
    config = _registry()[task][1]
    known = sorted(field.name for field in fields(config))
    unknown = sorted(set(args) - set(known))
    if unknown:
        raise SpecError(
            f"reasoning-gym:{task} takes no argument {unknown[0]!r}",
            pointer=pointer,
            mend=f"it takes {', '.join(known)}",
        )
    try:
        # The configuration alone: building the task may generate problems.
        built = config(**args)
        if hasattr(built, "validate"):
            built.validate()
    except Exception as error:  # assertions and errors of all kinds, task by task
        raise SpecError(
            f"reasoning-gym:{task} refuses its arguments: {error or type(error).__name__}",
            pointer=pointer,
            mend=f"it takes {', '.join(known)}",
        ) from None
