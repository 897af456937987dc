"""Verified answers a second, ours against plain math-verify, on the same pairs in the same run.

    python benchmarks/verify.py [--data-root FOLDER] [--pairs N]

GSM8K golds (``gsm8k_test.jsonl`` of the data root, else generated ones) against answers as models write them into
boxes, target: at least 500 distinct answers a second and process; golds of ``math500.jsonl``, if it is there, without a
target. Every (gold, answer) pair comes once, so that no cache helps. Where other work shares the cores, the rates for
each second of processor time (this process and the verifier's) are the ones to look at. Prints JSON.
"""

import argparse
import json
import logging
import os
import platform
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import psutil

from erpo_core.rewards.verify import Verdict, Verifier, verifier_version

Pairs = list[tuple[str, str]]
TARGET = 500


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("ERPO_DATA_ROOT"))
    parser.add_argument("--pairs", type=int, default=3000)
    arguments = parser.parse_args()
    draw = random.Random(0)
    golds = _answers(arguments.data_root, "gsm8k_test.jsonl")
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "verifier": verifier_version(),
        "gsm8k": {"golds": "gsm8k_test.jsonl" if golds else "generated", "target": TARGET}
        | _measure(
            _gsm8k_pairs(golds or [str(draw.randint(1, 5000)) for _ in range(1319)], draw), arguments.pairs, draw
        ),
    }
    if hard := _answers(arguments.data_root, "math500.jsonl"):
        report["math500"] = _measure(_math_pairs(hard, draw), arguments.pairs, draw)
    print(json.dumps(report, indent=2))


def _answers(root: Path | None, name: str) -> list[str]:
    path = Path(root) / name if root else None
    return [json.loads(line)["answer"] for line in path.open()] if path and path.is_file() else []


def _gsm8k_pairs(golds: list[str], draw: random.Random) -> Pairs:
    """Of ten boxes six hold a bare number, the others units, currency, decimals or a fraction; some are wrong."""
    pairs = []
    for gold in golds:
        wrong = str(int(gold) + draw.randint(1, 50))
        pairs += [
            (gold, gold),
            (gold, wrong),
            (gold, str(int(wrong) * 2)),
            (gold, f"{int(gold):,}.0"),
            (gold, f"{wrong}.5"),
        ]
        pairs += [(gold, f"-{gold}"), (gold, f"\\${gold}"), (gold, f"{gold}\\text{{ dollars}}")]
        pairs += [(gold, f"\\frac{{{2 * int(gold)}}}{{2}}"), (gold, f"{wrong}\\%")]
    return _distinct(pairs)


def _math_pairs(golds: list[str], draw: random.Random) -> Pairs:
    """Each gold written otherwise, and the golds of two other problems."""
    pairs = []
    for gold in golds:
        other = gold.replace("\\frac", "\\dfrac").replace(",", ", ").replace("(", "\\left(").replace(")", "\\right)")
        pairs += [(gold, f"{other}\\;"), (gold, draw.choice(golds)), (gold, draw.choice(golds))]
    return _distinct(pairs)


def _distinct(pairs: Pairs) -> Pairs:
    return list(dict.fromkeys(pairs))


def _measure(pairs: Pairs, most: int, draw: random.Random) -> dict[str, float]:
    pairs = draw.sample(pairs, min(most, len(pairs)))
    texts = [(gold, f"Thus the answer is \\boxed{{{answer}}}.") for gold, answer in pairs]
    ours, ours_cpu, verdicts = _ours(texts)
    plain, plain_cpu, right = _timed(lambda: [_plain(gold, text) for gold, text in texts])
    return {
        "pairs": len(texts),
        "ours_per_second": round(len(texts) / ours, 1),
        "math_verify_per_second": round(len(texts) / plain, 1),
        "ratio": round(plain / ours, 2),
        "ours_per_cpu_second": round(len(texts) / ours_cpu, 1),
        "math_verify_per_cpu_second": round(len(texts) / plain_cpu, 1),
        "ratio_cpu": round(plain_cpu / ours_cpu, 2),
        "right": sum(verdict is Verdict.RIGHT for verdict in verdicts),
        "math_verify_right": sum(right),
    }


def _ours(texts: Pairs) -> tuple[float, float, list[Verdict]]:
    with Verifier(processes=1) as verifier:
        verifier.check("x+1", "\\boxed{1+x}")  # the process starts
        return _timed(lambda: verifier.check_many(texts))


def _plain(gold: str, text: str) -> bool:
    from math_verify import parse, verify

    return verify(
        parse(f"\\boxed{{{gold}}}", parsing_timeout=None), parse(text, parsing_timeout=None), timeout_seconds=None
    )


def _timed(work: Callable[[], list]) -> tuple[float, float, list]:
    """Wall seconds, processor seconds of this process and its children, and what the work gives back."""
    started, cpu = time.perf_counter(), _cpu_seconds()
    found = work()
    return time.perf_counter() - started, _cpu_seconds() - cpu, found


def _cpu_seconds() -> float:
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children())]
    return sum(one.user + one.system for one in times)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # math-verify warns at every call without a time-out
    main()
