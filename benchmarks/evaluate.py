"""Our evaluation through vLLM against a plain ``vllm.LLM.chat`` loop with math-verify in one thread.

    python benchmarks/evaluate.py --problems 40 --num-samples 4 --max-tokens 256 --pairs 3 [--lm-eval PYTHON]

All arms get the same model, prompts, sampling and engine settings, each run in a process of its own, in alternating
order; every clock starts at a loaded engine that has answered one problem.

    ours     to the moment when every answer is checked and committed: the records travel to a recorder in another
             process, which writes them into SQLite, as a worker does
    plain    to the last answer of ``LLM.chat`` (the bare engine), and on to the last verdict (the loop)
    lm_eval  lm-evaluation-harness with its vLLM backend, to its table; PYTHON is an interpreter that has both

Compared are the tokens of answers per second: ours over the bare engine, over the loop, and over the harness. Every
answer of ours and of the loop runs to --max-tokens, no token ends it: sampled ends differ from run to run by more than
the arms do. With --natural-ends they end where they end; then an evaluation that drains its engine between batches (on
the CPU) pays for that, where there are more answers than one batch holds (128 on the CPU, 2048 on CUDA).
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from erpo_core import evaluation_model
from erpo_core.data.datasets import load_problems
from erpo_core.evaluation import run_evaluation
from erpo_core.generation.policy import open_vllm
from erpo_core.generation.vllm import cpu_settings
from erpo_core.job import JobInputs, ModelInput
from erpo_core.models import default_device, default_dtype, load_tokenizer, prepare_model
from erpo_core.prompts import prompt_ids, prompt_messages, stop_token_ids
from erpo_core.records import Completions, Resolved
from erpo_core.specs.evaluate import EvaluateSpec

# SmolLM2 answers a sum in twenty tokens; a story runs to the limit, and its last box is checked like any other.
INSTRUCTION = (
    "Write a long story around this question, a thousand words at least, and end it with the answer in \\boxed{}."
)
_CPU_SEQUENCES = 64
_CHANNEL_SECONDS = 60


class Nowhere:
    """A sink for the warm-up."""

    requested = False

    def emit(self, record: Any) -> None:
        pass


class Stored:
    """A sink that passes everything on to the recorder, and notes when the engine stood ready."""

    requested = False

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self.started = 0.0
        self.lengths: list[int] = []

    def emit(self, record: Any) -> None:
        if isinstance(record, Resolved):
            self.started = time.perf_counter()
        if isinstance(record, Completions):
            self.lengths += [row["num_tokens"] for row in record.rows]
        self._channel.emit(record)

    def close(self) -> float:
        """The time when the last record was committed."""
        self._channel.close()
        return time.perf_counter()


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


def engine_settings(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """vLLM's settings, as ours has them."""
    device = default_device()
    dtype = str(default_dtype(device)).removeprefix("torch.")
    longest = max_model_len(options)
    own = cpu_settings(path, dtype, longest, _CPU_SEQUENCES) if device == "cpu" else {"gpu_memory_utilization": 0.9}
    return {"dtype": dtype, "max_model_len": longest, **own}


def max_model_len(options: argparse.Namespace) -> int:
    return options.max_tokens + 256


def run_ours(options: argparse.Namespace) -> dict[str, float]:
    path, device = prepare_model(options.model, cache_dir=options.cache), default_device()
    engine = open_vllm(
        path,
        dtype=default_dtype(device),
        device=device,
        max_model_len=max_model_len(options),
        num_gpus=0,
        adapters=[None],
    )
    with tempfile.TemporaryDirectory() as folder, engine as opened, recorder(Path(folder)) as (channel, run_id):
        inputs = JobInputs("job", run_id, 1, Path(folder), options.cache, ModelInput(options.model))
        # Both evaluations get the same engine, so that the second finds it as warm as the plain loop finds its own.
        evaluation_model.open_vllm = lambda *_, **__: nullcontext(opened)
        if not options.natural_ends:
            evaluation_model.stop_token_ids = lambda *_: []
        nowhere = Nowhere()
        run_evaluation(make_spec(options, limit=1), inputs, nowhere, nowhere)
        sink = Stored(channel)
        run_evaluation(make_spec(options), inputs, sink, sink)
        return reading(sink.close() - sink.started, sink.lengths)


@contextmanager
def recorder(folder: Path) -> Iterator[tuple[Any, str]]:
    """A channel to a recorder in another process, and the run that it writes."""
    from workers.child.channel import Channel

    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=record, args=(folder, there))
    process.start()
    socket_path, run_id = here.recv()
    yield Channel(socket_path), run_id
    here.send("gone")
    process.join(_CHANNEL_SECONDS)


def record(folder: Path, pipe: Connection) -> None:
    """What a worker does with the records of an attempt."""
    from service.db.engine import Database
    from service.db.jobs import create_job
    from service.settings import Settings
    from workers.claims import Attempt, claim_next
    from workers.recorder import Recorder

    settings = Settings(data_dir=folder)
    database = Database(settings.database_url)
    database.migrate()
    with database.write() as session:
        create_job(session, kind="evaluate", spec={"model": "m"}, options={})
    claim = claim_next(database, settings, "benchmark")
    with Recorder(Attempt(database, settings, claim).apply) as running:
        pipe.send((str(running.path), claim.run_id))
        pipe.recv()
        running.drain(_CHANNEL_SECONDS)


def run_plain(options: argparse.Namespace) -> dict[str, float]:
    spec = make_spec(options)
    path = prepare_model(options.model, cache_dir=options.cache)
    settings = engine_settings(path, options)
    from math_verify import parse, verify
    from vllm import LLM, SamplingParams

    problems = load_problems(spec.dataset, data_root=None, cache_dir=options.cache, limit=spec.limit)
    tokenizer = load_tokenizer(path)
    llm = LLM(str(path), **settings)
    chats = [prompt_messages(problem.problem, spec.prompt) for problem in problems]
    params = SamplingParams(
        n=options.num_samples,
        temperature=1.0,
        max_tokens=options.max_tokens,
        stop_token_ids=stop_token_ids(tokenizer, path) if options.natural_ends else [],
        ignore_eos=not options.natural_ends,
    )
    llm.chat(chats[:1], params, use_tqdm=False)
    start = time.perf_counter()
    outputs = llm.chat(chats, params, use_tqdm=False)
    sampled = time.perf_counter()
    lengths = []
    for problem, output in zip(problems, outputs, strict=True):
        gold = parse(f"\\boxed{{{problem.answer}}}")
        for answer in output.outputs:
            verify(gold, parse(answer.text))
            lengths.append(len(answer.token_ids))
    verified = time.perf_counter()
    for problem, output in zip(problems, outputs, strict=True):
        if output.prompt_token_ids != prompt_ids(tokenizer, problem.problem, spec.prompt):
            sys.exit(f"the prompts of {problem.id} differ")
    engine = reading(sampled - start, lengths)
    return reading(verified - start, lengths) | {"engine_tokens_per_second": engine["tokens_per_second"]}


def run_lm_eval(options: argparse.Namespace) -> dict[str, float]:
    spec = make_spec(options)
    path = prepare_model(options.model, cache_dir=options.cache)
    settings = engine_settings(path, options)
    from lm_eval import simple_evaluate
    from lm_eval.models.vllm_causallms import VLLM
    from math_verify import parse, verify

    problems = load_problems(spec.dataset, data_root=None, cache_dir=options.cache, limit=spec.limit)
    tokenizer = load_tokenizer(path)
    chats = [prompt_messages(problem.problem, spec.prompt) for problem in problems]

    def judge(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
        gold = parse(f"\\boxed{{{doc['answer']}}}")
        return {"acc": statistics.mean(float(verify(gold, parse(text))) for text in results[0])}

    lm = VLLM(str(path), **settings)
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"text": chat[-1]["content"], "answer": p.answer} for chat, p in zip(chats, problems, strict=True)]
        (Path(folder) / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "task": "sums",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": f"{folder}/rows.jsonl"}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{answer}}",
            "process_results": judge,
            "repeats": options.num_samples,
            "generation_kwargs": {
                "until": [],
                "do_sample": True,
                "temperature": 1.0,
                "max_gen_toks": options.max_tokens,
            },
            "filter_list": [{"name": "all", "filter": [{"function": "take_first_k", "k": options.num_samples}]}],
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        more: dict[str, Any] = {"apply_chat_template": True, "bootstrap_iters": 0, "log_samples": True}
        simple_evaluate(lm, tasks=[task], limit=1, **more)
        start = time.perf_counter()
        found = simple_evaluate(lm, tasks=[task], **more)
        seconds = time.perf_counter() - start
    for problem, chat in zip(problems, chats, strict=True):
        if lm.tok_encode(lm.apply_chat_template(chat)) != prompt_ids(tokenizer, problem.problem, spec.prompt):
            sys.exit(f"the prompts of {problem.id} differ")
    # The harness keeps texts: a token more is the end of the answer, where it was not cut.
    texts = [text for sample in found["samples"]["sums"] for text in sample["resps"][0]]
    counts = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts]
    return reading(seconds, [min(count, options.max_tokens) for count in counts])


def reading(seconds: float, lengths: list[int]) -> dict[str, float]:
    return {
        "seconds": seconds,
        "answers": len(lengths),
        "answers_per_second": len(lengths) / seconds,
        "tokens_per_second": sum(lengths) / seconds,
        "mean_length": statistics.mean(lengths),
    }


ARMS = {"ours": run_ours, "plain": run_plain, "lm_eval": run_lm_eval}


def run_apart(arm: str, python: str = sys.executable) -> dict[str, float]:
    """One run of an arm in a process of its own."""
    command = [python, *sys.argv, "--arm", arm]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def ratios(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Ours over the others, in tokens of answers per second."""
    ours, plain = found["ours"]["tokens_per_second"], found["plain"]
    over = {"engine": plain["engine_tokens_per_second"], "loop": plain["tokens_per_second"]}
    if "lm_eval" in found:
        over["lm_eval"] = found["lm_eval"]["tokens_per_second"]
    return {name: ours / value for name, value in over.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dataset", default="reasoning-gym:chain_sum?min_terms=2&max_terms=2&size=512")
    parser.add_argument("--problems", type=int, default=40)
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each arm")
    parser.add_argument("--natural-ends", action="store_true", help="answers end with their stop tokens")
    parser.add_argument("--lm-eval", metavar="PYTHON", help="an interpreter with lm-eval beside vLLM")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "erpo-benchmarks")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(ARMS[options.arm](options)))
        return
    pythons = {"ours": sys.executable, "plain": sys.executable}
    pythons |= {"lm_eval": options.lm_eval} if options.lm_eval else {}
    read = []
    for pair in range(options.pairs):
        order = list(pythons) if pair % 2 == 0 else list(reversed(pythons))
        found = {arm: run_apart(arm, pythons[arm]) for arm in order}
        read.append(ratios(found))
        print(json.dumps({"pair": pair + 1, **found, "ours_over": read[-1]}), flush=True)
    for name in read[0]:
        values = [one[name] for one in read]
        print(
            json.dumps({"ours_over": name, "median": statistics.median(values), "min": min(values), "max": max(values)})
        )


if __name__ == "__main__":
    main()
