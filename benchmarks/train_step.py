"""What a training step costs: TRL's GRPOTrainer (a), our GRPO (b) and ERPO (c), on the same prompts and answer lengths.

    python benchmarks/train_step.py                    # the case of 32 + 64 tokens in float32
    python benchmarks/train_step.py --arms a c v       # with vLLM (v), where it is installed
    python benchmarks/train_step.py --full --write     # every case, into benchmarks/RESULTS.md

Every arm has the same model, LoRA, dtype, beta, optimizer, threads and attention kernel, and no gradient checkpointing.
Arms take turns in random order. A step is sampling, reference, policy forward, backward and optimizer. Memory is the
peak above the loaded trainer, from a process for each arm.
"""

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
# Freed memory stays with the process, in every arm alike: page faults would be half of what is measured on a CPU.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}
PHASES = ("generate", "reference", "forward", "noise", "backward and rest", "step")


def main() -> None:
    """Measure and report."""
    args = parse()
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)
    import results

    model = args.model or results.smollm2()
    if args.memory_of:
        print(json.dumps(peak_above_load(args.memory_of, make_case(args, model))))
        return
    sections = []
    for dtype in args.dtypes:
        for prompt_length in args.prompt_lengths:
            for mean in args.mean_lengths:
                args.dtype, args.prompt_length, args.mean_length = dtype, prompt_length, mean
                sections.append(run_case(args, model))
                print(sections[-1], flush=True)
    if args.write:
        results.write_section("Training step", __doc__, "\n\n".join(sections))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a safetensors folder; SmolLM2-135M-Instruct by default")
    parser.add_argument("--rounds", type=int, default=3, help="steps of each arm, sampling included")
    parser.add_argument("--pairs", type=int, default=0, help="pairs of b and c without sampling, for c/b")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--prompt-lengths", nargs="+", type=int, default=[32])
    parser.add_argument("--mean-lengths", nargs="+", type=int, default=[64])
    parser.add_argument("--arms", nargs="+", default=["a", "b", "c"])
    parser.add_argument("--full", action="store_true", help="every dtype and length, 30 pairs")
    parser.add_argument("--no-memory", action="store_true", help="leave out the process for each arm's peak")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--prompt-length", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--mean-length", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.full:
        args.dtypes, args.prompt_lengths, args.mean_lengths = ["float32", "bfloat16"], [32, 110], [64, 256]
        args.pairs = max(args.pairs, 30)
    return args


def make_case(args: argparse.Namespace, model: Path):
    from arms import Case

    return Case(model, args.dtype, args.prompt_length, lengths_around(args.mean_length))


def lengths_around(mean: int, count: int = 16) -> tuple[int, ...]:
    """A fixed list of unequal lengths, from a fifth of the mean to 1.8 times, in no order."""
    even = [round(mean * (0.2 + 1.6 * (i + 0.5) / count)) for i in range(count)]
    random.Random(5).shuffle(even)
    return tuple(even)


def run_case(args: argparse.Namespace, model: Path) -> str:
    """One row of the report."""
    case = make_case(args, model)
    # What it holds is freed before the memory of each arm is measured in a process of its own.
    rounds, pairs, flops = time_case(args, case)
    gc.collect()
    memory = {} if args.no_memory else {name: memory_of(args, name, model) for name in args.arms}
    return report(case, rounds, pairs, flops, memory)


def time_case(args: argparse.Namespace, case) -> tuple[dict[str, list], list[tuple[float, float]], dict[str, int]]:
    """Steps of each arm with their phases, seconds of (c, b) without sampling, and FLOPs of these."""
    from arms import FixedAnswers, make_arm

    shuffle, pairs = random.Random(1), []
    with tempfile.TemporaryDirectory() as folder:
        arms = {name: make_arm(name, case, Path(folder) / name) for name in args.arms}
        for arm in arms.values():
            arm.step()  # warm-up
        rounds = {name: [] for name in arms}
        for _ in range(args.rounds):
            for name in shuffle.sample(sorted(arms), len(arms)):
                rounds[name].append(arms[name].step())
                tell(name, rounds[name][-1])
        ours = [name for name in ("b", "c") if name in arms]
        if not args.pairs or len(ours) < 2:
            return rounds, pairs, {}
        for name in ours:
            FixedAnswers(arms[name])
            arms[name].step()
        for _ in range(args.pairs):
            found = {name: arms[name].step()["step"] for name in shuffle.sample(ours, 2)}
            pairs.append((found["c"], found["b"]))
            tell("pair", found)
        return rounds, pairs, {name: flops_of(arms[name]) for name in ours}


def tell(what: str, seconds: dict[str, float]) -> None:
    """Progress, where a run of an hour could end before its report."""
    print(what, {name: round(value, 2) for name, value in seconds.items()}, file=sys.stderr, flush=True)


def flops_of(arm) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        arm.step()
    return counter.get_total_flops()


def memory_of(args: argparse.Namespace, name: str, model: Path) -> int:
    """Bytes, from a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name, "--model", str(model), "--dtype", args.dtype]
    command += ["--prompt-length", str(args.prompt_length), "--mean-length", str(args.mean_length)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def peak_above_load(name: str, case) -> int:
    """Peak bytes of two steps above what the trainer holds before the first."""
    import results
    from arms import make_arm

    with tempfile.TemporaryDirectory() as folder:
        arm = make_arm(name, case, Path(folder))
        with results.PeakMemory() as peak:
            arm.step()
            arm.step()
    return peak.bytes_above_start


def report(case, rounds, pairs, flops, memory) -> str:
    import results
    from arms import ARMS

    tokens, steps = sum(case.lengths), len(next(iter(rounds.values())))
    mean = tokens / len(case.lengths)
    lines = [
        f"### {case.dtype}, prompts of {case.prompt_length}, answers of {mean:.0f} tokens in the mean",
        "",
        f"{len(case.lengths)} answers of {min(case.lengths)} to {max(case.lengths)} tokens; medians of {steps}, s.",
        "",
        "| arm | " + " | ".join(PHASES) + " | tokens/s | peak memory |",
        "|---" * (len(PHASES) + 3) + "|",
    ]
    for name, found in rounds.items():
        medians = [results.median([step[phase] for step in found]) for phase in PHASES]
        cells = [f"{seconds:.2f}" for seconds in medians]
        cells += [f"{tokens / medians[-1]:.1f}", f"{memory[name] / 2**20:.0f} MiB" if memory else "-"]
        lines.append(f"| {name}: {ARMS[name]} | " + " | ".join(cells) + " |")
    lines.append("")
    for top, bottom in (("c", "a"), ("v", "a"), ("b", "a")):
        if top in rounds and bottom in rounds:
            both = list(zip(rounds[top], rounds[bottom], strict=True))
            whole = results.ratio([(t["step"], b["step"]) for t, b in both])
            rest = results.ratio([(t["step"] - t["generate"], b["step"] - b["generate"]) for t, b in both])
            share = f"; memory {memory[top] / memory[bottom]:.2f}" if memory else ""
            lines.append(f"- {top}/{bottom}: {whole}; without sampling {rest}{share}")
    if pairs:
        lines.append(f"- c/b without sampling, noise included: {results.ratio(pairs)} over {len(pairs)} pairs")
        lines.append(f"- FLOPs c/b: {flops['c'] / flops['b']:.4f} ({flops['c'] / 1e12:.3f} TFLOP)")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
