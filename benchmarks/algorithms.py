"""What the algorithms come to: GRPO and ERPO over several seeds, on one task, scored on the same held-out problems.

    python benchmarks/algorithms.py --out FOLDER                                  # 60 steps, 3 seeds: minutes on a GPU
    python benchmarks/algorithms.py --out FOLDER --arms grpo erpo:0.5 --seeds 8

An arm is ``grpo`` or ``erpo:ETA`` (synthesis_weight). Arms of a seed share the order of the data and all else.
Readings are lines of FOLDER/readings.jsonl. A run is made once: several processes may share a folder, each takes the
next run that none has taken (delete FOLDER/taken after a crash).

The interval of a difference to ``grpo`` is Student's over seeds: what another seed would do, not another sample.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from erpo_core.evaluation import run_evaluation
from erpo_core.job import JobInputs, ModelInput
from erpo_core.records import Checkpoint, Completions
from erpo_core.specs import parse_spec
from erpo_core.trainer.run import run_training
from service.cli.demo import MAX_COMPLETION_LENGTH, MODEL, TASK, evaluation_spec, training_spec

DECODINGS = {"sampled": (1.0, 4), "greedy": (0.0, 1)}
"""Temperature and answers a problem."""
_T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}


class Kept:
    """A sink that keeps what is asked about afterwards."""

    requested = False

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.checkpoint: str | None = None

    def emit(self, record: Any) -> None:
        if isinstance(record, Completions):
            self.rows += record.rows
        if isinstance(record, Checkpoint):
            self.checkpoint = record.path


def main() -> None:
    """Make the runs that nobody has made, and report on all that there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=["grpo", "erpo:0.1", "erpo:0.5"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--problems", type=int, default=256, help="held out")
    options = parser.parse_args()
    (options.out / "taken").mkdir(parents=True, exist_ok=True)
    for arm, seed in [("base", 0), *((arm, seed) for seed in range(options.seeds) for arm in options.arms)]:
        if take(options.out / "taken" / f"{arm}-{seed}"):
            write(options.out, read_run(arm, seed, options))
    print(report([json.loads(line) for line in (options.out / "readings.jsonl").read_text().splitlines()]))


def take(mark: Path) -> bool:
    """Whether nobody has taken it before."""
    try:
        mark.mkdir()
    except FileExistsError:
        return False
    return True


def write(out: Path, reading: dict[str, Any]) -> None:
    with (out / "readings.jsonl").open("a") as file:
        file.write(json.dumps(reading) + "\n")
    print({name: reading[name] for name in ("arm", "seed", "seconds", *DECODINGS)}, file=sys.stderr, flush=True)


def read_run(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy and share of boxed answers of one trained model, or of the base."""
    start, folder = time.monotonic(), options.out / f"{arm}-{seed}"
    inputs = JobInputs("job", "run", 1, folder, options.out / "cache", ModelInput(MODEL))
    folder.mkdir(exist_ok=True)
    model = ModelInput(MODEL) if arm == "base" else ModelInput(MODEL, train(arm, seed, options.steps, inputs))
    reading: dict[str, Any] = {"arm": arm, "seed": seed, "steps": options.steps, "problems": options.problems}
    for name, (temperature, num_samples) in DECODINGS.items():
        rows = evaluate(model, temperature, num_samples, options.problems, inputs)
        reading[name] = statistics.mean(row["reward"] for row in rows)
        reading[f"{name}_boxed"] = statistics.mean(row["boxed"] for row in rows)
    return reading | {"seconds": round(time.monotonic() - start)}


def train(arm: str, seed: int, steps: int, inputs: JobInputs) -> Path:
    """The folder of the last checkpoint."""
    algorithm, _, eta = arm.partition(":")
    body = training_spec(steps) | {
        "algorithm": algorithm,
        "dataset": f"{TASK}&size=4000&seed={seed + 1}",
        "num_generations": 8,
        "generation_batch_size": 64,
        "bf16": False,
        "preflight": False,
        "trace_every": steps + 1,
        "seed": seed,
    }
    del body["synthesis_weight"]  # ERPO's own
    sink = Kept()
    spec = parse_spec("train", body | ({"synthesis_weight": float(eta)} if eta else {}))
    run_training(spec, inputs, sink, sink)
    return Path(sink.checkpoint)


def evaluate(
    model: ModelInput, temperature: float, num_samples: int, problems: int, inputs: JobInputs
) -> list[dict[str, Any]]:
    """Rows of the answers to the held-out problems, which are the same for every model."""
    body = evaluation_spec(MODEL, "held out") | {
        "dataset": f"{TASK}&size={problems}&seed=20260101",
        "sampling": {"temperature": temperature, "max_completion_length": MAX_COMPLETION_LENGTH, "seed": 7},
        "num_samples": num_samples,
        "pass_at": [1],
        "batch_size": 512,
        "bf16": False,
    }
    sink = Kept()
    run_evaluation(
        parse_spec("evaluate", body),
        JobInputs("job", "run", 1, inputs.work_dir, inputs.cache_dir, model),
        sink,
        sink,
    )
    return sink.rows


def report(readings: list[dict[str, Any]]) -> str:
    """A row an arm: mean over seeds, the seeds, and what it is above ``grpo`` of the same seeds."""
    lines = ["| arm | seeds | " + " | ".join(f"{name} | less `grpo`" for name in DECODINGS) + " |"]
    lines.append("|---" * (2 + 2 * len(DECODINGS)) + "|")
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for reading in readings:
        by_arm.setdefault(reading["arm"], {})[reading["seed"]] = reading
    for arm, found in by_arm.items():
        cells = [arm, str(len(found))]
        for name in DECODINGS:
            values = [100 * reading[name] for _, reading in sorted(found.items())]
            each = f" ({', '.join(f'{value:.1f}' for value in values)})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}%{each}")
            cells.append("" if arm in ("base", "grpo") else difference(found, by_arm.get("grpo", {}), name))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference(found: dict[int, dict], other: dict[int, dict], name: str) -> str:
    """Of the seeds that both have, in points, with Student's 95% interval."""
    gaps = np.array([100 * (found[seed][name] - other[seed][name]) for seed in found.keys() & other.keys()])
    if len(gaps) < 2 or len(gaps) - 1 not in _T_975:
        return f"{gaps.mean():+.1f}" if len(gaps) else ""
    half = _T_975[len(gaps) - 1] * gaps.std(ddof=1) / len(gaps) ** 0.5
    return f"{gaps.mean():+.1f} [{gaps.mean() - half:+.1f}, {gaps.mean() + half:+.1f}]"


if __name__ == "__main__":
    main()
