"""Exact per-token entropy: time and peak memory against the bare body, plain logits, and TRL's fused head.

    python benchmarks/entropy_scoring.py                                      # small: 256 tokens
    python benchmarks/entropy_scoring.py --model smollm2-135m --tokens 2048   # V = 49,152
    python benchmarks/entropy_scoring.py --model qwen2.5-0.5b --tokens 2048   # V = 151,936

Models have random weights of the named shape. Arms, each in a process of its own, float32 throughout:

- ``body``: the transformer without its head.
- ``body+gemm``: and one product with the head, in tiles, nothing kept: the floor for any exact entropy.
- ``ours``: ``erpo_core.logits.score_tokens``: entropy, log p, varentropy, p of the top token, rank.
- ``log_softmax``: transformers' logits, then log_softmax and the textbook sum: what one writes first.
- ``trl``: TRL's ``add_fused_lm_head(outputs=("log_probs", "entropy"))``.

Prints one JSON document. ``peak_mib`` is the highest resident memory above that of the loaded model (two tokens having
been scored, so that libraries are warm). ``head_*`` times the head alone on fixed hidden states.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ARMS = ("body", "body+gemm", "ours", "log_softmax", "trl")
SHAPES = {
    "smollm2-135m": {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    | {"num_attention_heads": 9, "num_key_value_heads": 3},
    "qwen2.5-0.5b": {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2},
}
_TILE_ELEMENTS = 2**24


def main() -> None:
    """Measure every arm and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--arm", choices=ARMS, help="only this arm, in this process")
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(measure(arguments.arm, arguments)))
        return
    arms = {arm: _in_process_of_its_own(arm) for arm in ARMS}
    floor, plain, ours = arms["body+gemm"], arms["log_softmax"], arms["ours"]
    ratios = {
        "time_to_body_and_gemm": ours["seconds"] / floor["seconds"],
        "head_time_to_gemm": ours["head_seconds"] / floor["head_seconds"],
        "speedup_over_log_softmax": plain["seconds"] / ours["seconds"],
        "speedup_over_trl": arms["trl"]["seconds"] / ours["seconds"],
        "memory_to_log_softmax": ours["peak_mib"] / plain["peak_mib"],
        "memory_to_trl": ours["peak_mib"] / max(arms["trl"]["peak_mib"], 0.1),
    }
    settings = {
        "model": arguments.model,
        "tokens": arguments.tokens,
        "vocabulary": SHAPES[arguments.model]["vocab_size"],
    }
    print(json.dumps(settings | {"arms": arms, "ratios": ratios}, indent=1))


def _in_process_of_its_own(arm: str) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(arm: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds and peak memory of one arm in this process."""
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = _model(SHAPES[arguments.model], arguments.tokens)
    ids = torch.randint(0, model.config.vocab_size, (1, arguments.tokens + 1))
    run, head = _arm(arm, model, ids)
    with torch.no_grad():
        _arm(arm, model, ids[:, :3])[0]()
        before = _resident_mib()
        _reset_peak()
        seconds = [_timed(run) for _ in range(arguments.repeats)]
        peak = _peak_mib() - before
        head_seconds = [_timed(head) for _ in range(arguments.repeats)] if head else []
    return {
        "seconds": statistics.median(seconds),
        "tokens_per_second": arguments.tokens / statistics.median(seconds),
        "head_seconds": statistics.median(head_seconds) if head_seconds else None,
        "peak_mib": peak,
        "threads": torch.get_num_threads(),
    }


def _model(shape: dict[str, int], tokens: int):
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(**shape, max_position_embeddings=max(4096, tokens + 1), tie_word_embeddings=True)
    return AutoModelForCausalLM.from_config(config).float().eval()


def _arm(arm: str, model, ids) -> tuple[Callable[[], object], Callable[[], object] | None]:
    """What the arm computes for all tokens after the first, and its head's part alone on hidden states."""
    import torch

    from erpo_core.logits import score_tokens

    weight, targets = model.get_output_embeddings().weight.detach(), ids[0, 1:]

    def body():
        return model.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]

    def gemm(hidden):
        size = max(1, _TILE_ELEMENTS // len(weight))
        out = hidden.new_empty(min(size, len(hidden)), len(weight))
        for start in range(0, len(hidden), size):
            part = hidden[start : start + size]
            torch.mm(part, weight.T, out=out[: len(part)])

    def plain(hidden):
        logps = (hidden @ weight.T).log_softmax(-1)
        return logps.gather(1, targets[:, None]), -(logps.exp() * logps).sum(-1)

    def ours(hidden):
        return score_tokens(hidden, weight, targets)

    heads = {"body+gemm": gemm, "ours": ours, "log_softmax": plain}
    if arm == "trl":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model, cast_lm_head_to_fp32=True, outputs=("log_probs", "entropy"))
        return lambda: model(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False), None
    if arm == "body":
        return body, None
    with torch.no_grad():
        hidden = torch.randn(len(targets), weight.shape[1])
    return lambda: heads[arm](body()), lambda: heads[arm](hidden)


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _reset_peak() -> None:
    """Linux: VmHWM begins anew at the present resident size."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
