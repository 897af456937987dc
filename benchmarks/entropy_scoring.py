"""Exact per-token entropy: time and peak memory against the bare body, plain logits, and TRL's fused head.

    python benchmarks/entropy_scoring.py                       # small: SmolLM2's shape, 256 tokens, 2 rounds
    python benchmarks/entropy_scoring.py --full --write        # V = 49k and V = 152k, 2,048 tokens, into RESULTS.md

Models have random weights of the named shape, on CUDA where there is one. Float32 throughout, or --dtype bfloat16: then
the other arms' logits are what they make of them, and the entropies' distance from ours is reported. Arms:

- body: the transformer without its head.
- body+gemm: and one product with the head, in tiles of the vocabulary, nothing kept: the floor for any exact entropy.
- ours: erpo_core.logits.score_tokens: entropy, log p, varentropy, p of the top token, rank.
- log_softmax: transformers' logits, log_softmax and the textbook sum: what one writes first.
- trl: TRL's add_fused_lm_head, entropy and log p.

Every reading is of a process of its own; in each round the arms take turns in random order, and ratios are of the arms
of one round. A process warms up with one whole run. All arms keep freed memory (page faults would be much of what is
measured), but for the peak: resident memory (on CUDA: allocated) above the loaded model, from processes with the usual
allocator. In float32, arms whose mean entropies differ by more than 1e-3 nats stop the benchmark.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}
ARMS = ("body", "body+gemm", "ours", "log_softmax", "trl")
SHAPES = {
    "smollm2-135m": {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    | {"num_attention_heads": 9, "num_key_value_heads": 3},
    "qwen2.5-0.5b": {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2},
}
_TILE_ELEMENTS = 2**21
_SAME_ENTROPY = 1e-3
Run = Callable[[], object]


def main() -> None:
    """Measure and report."""
    arguments = parse()
    if arguments.arm:
        shape = arguments.models[0]
        found = peak(arguments.arm, shape, arguments) if arguments.peak else seconds(arguments.arm, shape, arguments)
        print(json.dumps(found))
        return
    import results

    sections = []
    for shape in arguments.models:
        sections.append(report(shape, arguments, *read_all(shape, arguments)))
        print(sections[-1], flush=True)
    if arguments.write:
        results.write_section("Entropy scoring", __doc__, "\n\n".join(sections))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=["smollm2-135m"])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each arm")
    parser.add_argument("--repeats", type=int, default=3, help="runs of a process, after the first")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--full", action="store_true", help="both shapes, 2,048 tokens, 5 rounds")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.full:
        arguments.models, arguments.tokens, arguments.rounds = sorted(SHAPES, reverse=True), 2048, 5
    return arguments


def read_all(shape: str, arguments: argparse.Namespace) -> tuple[list[dict[str, dict]], dict[str, float]]:
    """Readings of each round by arm, and the peak of each arm in MiB."""
    shuffle, rounds = random.Random(1), []
    for _ in range(arguments.rounds):
        found = {arm: _apart(arm, shape, arguments) for arm in shuffle.sample(arguments.arms, len(arguments.arms))}
        entropies = {arm: one["mean_entropy"] for arm, one in found.items() if one["mean_entropy"] is not None}
        apart = max(entropies.values()) - min(entropies.values())
        if apart > _SAME_ENTROPY and arguments.dtype == "float32":
            raise SystemExit(f"the arms do not compute the same: {entropies}")
        rounds.append(found)
    return rounds, {arm: _apart(arm, shape, arguments, "--peak")["peak_mib"] for arm in arguments.arms}


def _apart(arm: str, shape: str, arguments: argparse.Namespace, *more: str) -> dict:
    command = [sys.executable, __file__, "--arm", arm, "--models", shape, "--tokens", str(arguments.tokens)]
    command += ["--repeats", str(arguments.repeats), "--threads", str(arguments.threads), "--dtype", arguments.dtype]
    command += more
    environment = os.environ if "--peak" in more else os.environ | ALLOCATOR
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def report(shape: str, arguments: argparse.Namespace, rounds: list[dict[str, dict]], peaks: dict[str, float]) -> str:
    import results

    def paired(top: str, bottom: str, name: str = "seconds") -> str:
        return results.ratio([(found[top][name], found[bottom][name]) for found in rounds])

    vocabulary, tokens = SHAPES[shape]["vocab_size"], arguments.tokens
    lines = [
        f"### {shape}: V = {vocabulary:,}, {tokens:,} tokens, {arguments.dtype}",
        "",
        f"Medians of {len(rounds)} processes, {arguments.repeats} runs each.",
        "",
        "| arm | s | tokens/s | head alone, s | peak above the model, MiB |",
        "|---|---|---|---|---|",
    ]
    for arm in arguments.arms:
        whole = results.median([found[arm]["seconds"] for found in rounds])
        heads = [found[arm]["head_seconds"] for found in rounds if found[arm]["head_seconds"] is not None]
        head = f"{results.median(heads):.4f}" if heads else ""
        lines.append(f"| {arm} | {whole:.4f} | {tokens / whole:.0f} | {head} | {peaks[arm]:.0f} |")
    lines.append("")
    if {"ours", "body+gemm"} <= set(arguments.arms):
        heads = paired("ours", "body+gemm", "head_seconds")
        lines.append(
            f"- time, ours / (body + one product): {paired('ours', 'body+gemm')} (target 1.1); heads alone {heads}"
        )
    for other, target in (("log_softmax", " (target 0.1)"), ("trl", "")):
        if {"ours", other} <= set(arguments.arms):
            memory = f"memory, ours / {other}: {peaks['ours'] / peaks[other]:.3f}{target}"
            apart = rounds[0][other]["mean_entropy"] - rounds[0]["ours"]["mean_entropy"]
            lines.append(f"- time, {other} / ours: {paired(other, 'ours')}; {memory}; mean entropy {apart:+.4f} nats")
    return "\n".join(lines)


def seconds(arm: str, shape: str, arguments: argparse.Namespace) -> dict[str, float | None]:
    """Median seconds of one arm in this process, of its head alone on fixed hidden states, and what it computes."""
    import torch

    run, head = _prepare(arm, shape, arguments)
    with torch.no_grad():
        entropies = run()
        whole = [_timed(run) for _ in range(arguments.repeats)]
        alone = [_timed(head) for _ in range(arguments.repeats + 1)][1:] if head else []
    return {
        "seconds": statistics.median(whole),
        "head_seconds": statistics.median(alone) if alone else None,
        "mean_entropy": entropies.mean().item() if isinstance(entropies, torch.Tensor) else None,
    }


def peak(arm: str, shape: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Resident memory of this process at the peak of one run, above the loaded model; libraries are warm."""
    import results
    import torch

    with torch.no_grad():
        _prepare(arm, "smollm2-135m", argparse.Namespace(**vars(arguments) | {"tokens": 2}))[0]()
        run, _ = _prepare(arm, shape, arguments)
        with results.PeakMemory() as memory:
            run()
    return {"peak_mib": memory.bytes_above_start / 2**20}


def _prepare(arm: str, shape: str, arguments: argparse.Namespace) -> tuple[Run, Run | None]:
    """What the arm computes for all tokens after the first (its entropies, if any), and its head's part alone."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    places = max(4096, arguments.tokens + 1)
    config = Qwen2Config(**SHAPES[shape], max_position_embeddings=places, tie_word_embeddings=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_config(config).to(device, getattr(torch, arguments.dtype)).eval()
    ids = torch.randint(0, config.vocab_size, (1, arguments.tokens + 1)).to(device)
    return _arm(arm, model, ids)


def _arm(arm: str, model, ids) -> tuple[Run, Run | None]:
    import torch

    from erpo_core.logits import score_tokens

    weight, targets = model.get_output_embeddings().weight.detach(), ids[0, 1:]
    hidden = torch.randn(len(targets), weight.shape[1]).to(weight)

    def body():
        return model.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]

    def gemm(hidden):
        size = max(1, _TILE_ELEMENTS // len(hidden))
        out = hidden.new_empty(size * len(hidden))
        for part in weight.split(size):
            torch.mm(hidden, part.T, out=out[: len(hidden) * len(part)].view(len(hidden), len(part)))

    def textbook(logits):
        logps = logits.log_softmax(-1)
        logps.gather(1, targets[:, None])
        return -(logps.exp() * logps).sum(-1)

    if arm == "trl":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model, cast_lm_head_to_fp32=True, outputs=("log_probs", "entropy"))
        return lambda: model(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False).entropy[0], None
    runs: dict[str, tuple[Run, Run | None]] = {
        "body": (lambda: (body(), None)[1], None),
        "body+gemm": (lambda: gemm(body()), lambda: gemm(hidden)),
        "ours": (
            lambda: score_tokens(body(), weight, targets).entropies,
            lambda: score_tokens(hidden, weight, targets),
        ),
        "log_softmax": (
            lambda: textbook(model(input_ids=ids, use_cache=False).logits[0, :-1]),
            lambda: textbook(hidden @ weight.T),
        ),
    }
    return runs[arm]


def _timed(run: Run) -> float:
    from results import synced

    start = time.perf_counter()
    run()
    return synced(start)


if __name__ == "__main__":
    main()
