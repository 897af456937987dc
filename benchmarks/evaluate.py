"""Our evaluation through vLLM against a plain ``vllm.LLM.chat`` loop with math-verify in one thread.

    python benchmarks/evaluate.py --problems 8 --num-samples 4 --max-tokens 256 --pairs 3

Both arms get the same model, prompts and sampling, each run in a process of its own, in alternating order. The clock
runs from the loaded and warmed engine to the last verdict (ours: handed on for storage as well). Compared are the
tokens of checked answers per second; the ratio is ours over plain, pair by pair.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from erpo_core import evaluation
from erpo_core.data.datasets import load_problems
from erpo_core.generation.policy import open_vllm
from erpo_core.job import JobInputs, ModelInput
from erpo_core.models import load_tokenizer, prepare_model
from erpo_core.prompts import prompt_messages, stop_token_ids
from erpo_core.records import Completions, Resolved, Result
from erpo_core.specs.evaluate import EvaluateSpec

# SmolLM2 answers a sum in twenty tokens; a story runs to the limit, and its last box is checked like any other.
INSTRUCTION = (
    "Write a long story around this question, a thousand words at least, and end it with the answer in \\boxed{}."
)


class Clock:
    """A sink that notes when the engine stood ready and when the last answer was stored."""

    requested = False

    def __init__(self) -> None:
        self.started = self.ended = 0.0
        self.rows: list[dict[str, Any]] = []

    def emit(self, record: Any) -> None:
        if isinstance(record, Resolved):
            self.started = time.perf_counter()
        if isinstance(record, Completions):
            self.rows += record.rows
        if isinstance(record, Result):
            self.ended = time.perf_counter()


def make_spec(options: argparse.Namespace, **more: Any) -> EvaluateSpec:
    body = {
        "model": options.model,
        "dataset": options.dataset,
        "prompt": {"instruction": INSTRUCTION},
        "limit": options.problems,
        "num_samples": options.num_samples,
        "pass_at": [1],
        "engine": "vllm",
        "sampling": {"max_completion_length": options.max_tokens},
    }
    return EvaluateSpec.model_validate(body | more)


def max_model_len(options: argparse.Namespace) -> int:
    return options.max_tokens + 256


def run_ours(options: argparse.Namespace) -> dict[str, float]:
    path = prepare_model(options.model, cache_dir=options.cache)
    with tempfile.TemporaryDirectory() as folder:
        inputs = JobInputs("job_1", "run_1", 1, Path(folder), options.cache, ModelInput(options.model))
        with open_vllm(inputs, path, dtype=None, max_model_len=max_model_len(options), num_gpus=0) as opened:
            # Both evaluations get the same engine, so that the second finds it as warm as the plain loop finds its own.
            evaluation.open_vllm = lambda *_, **__: nullcontext(opened)
            for spec in (make_spec(options, limit=1), make_spec(options)):
                clock = Clock()
                evaluation.run_evaluation(spec, inputs, clock, clock)
    return reading(clock.ended - clock.started, [row["num_tokens"] for row in clock.rows])


def run_plain(options: argparse.Namespace) -> dict[str, float]:
    import torch

    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from math_verify import parse, verify
    from vllm import LLM, SamplingParams

    spec = make_spec(options)
    path = prepare_model(options.model, cache_dir=options.cache)
    problems = load_problems(spec.dataset, data_root=None, cache_dir=options.cache, limit=spec.limit)
    on_cpu = {} if cuda else {"enforce_eager": True, "gpu_memory_utilization": 0.3, "max_num_seqs": 64}
    llm = LLM(str(path), dtype="bfloat16" if cuda else "float32", max_model_len=max_model_len(options), **on_cpu)
    chats = [prompt_messages(problem.problem, spec.prompt) for problem in problems]
    stops = stop_token_ids(load_tokenizer(path))
    params = SamplingParams(n=options.num_samples, temperature=1.0, max_tokens=options.max_tokens, stop_token_ids=stops)
    llm.chat(chats[:1], params, use_tqdm=False)
    start = time.perf_counter()
    lengths = []
    for problem, output in zip(problems, llm.chat(chats, params, use_tqdm=False), strict=True):
        gold = parse(f"\\boxed{{{problem.answer}}}")
        for answer in output.outputs:
            verify(gold, parse(answer.text))
            lengths.append(len(answer.token_ids))
    return reading(time.perf_counter() - start, lengths)


def reading(seconds: float, lengths: list[int]) -> dict[str, float]:
    return {
        "seconds": seconds,
        "answers_per_second": len(lengths) / seconds,
        "tokens_per_second": sum(lengths) / seconds,
        "mean_length": statistics.mean(lengths),
    }


ARMS = {"ours": run_ours, "plain": run_plain}


def run_apart(arm: str) -> dict[str, float]:
    """One run of an arm in a process of its own."""
    command = [sys.executable, *sys.argv, "--arm", arm]
    last_line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    return json.loads(last_line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dataset", default="reasoning-gym:chain_sum?min_terms=2&max_terms=2&size=512")
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each arm")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "erpo-benchmarks")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(ARMS[options.arm](options)))
        return
    ratios = []
    for pair in range(options.pairs):
        order = ("ours", "plain") if pair % 2 == 0 else ("plain", "ours")
        found = {arm: run_apart(arm) for arm in order}
        ratios.append(found["ours"]["tokens_per_second"] / found["plain"]["tokens_per_second"])
        print(json.dumps({"pair": pair + 1, **found, "ratio": ratios[-1]}), flush=True)
    print(json.dumps({"ratio_median": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}))


if __name__ == "__main__":
    main()
