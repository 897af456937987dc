"""``erpo demo``: train, evaluate and analyse a real model, all of it through the public HTTP API."""

import os
import sys
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from erpo_core.data.worked_examples import ARITHMETIC
from erpo_core.errors import ErpoError
from service.cli.terminal.colours import nice_domain
from service.cli.terminal.curves import curve
from service.cli.terminal.progress import clock, job_progress
from service.cli.terminal.report import comparison, wording
from service.cli.terminal.tokens import legend, token_text
from service.client import ErpoApiError, ErpoClient, JobFailed, JobHandle
from service.settings import Settings

MODEL = "smollm2-135m"
TASK = "reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=2"
TRAINING_SET = f"{TASK}&size=2000&seed=1"
HELD_OUT_SET = f"{TASK}&size=64&seed=20260101"
STEPS = 10
MAX_COMPLETION_LENGTH = 32


@dataclass(frozen=True)
class DemoRuns:
    """The runs of one demo."""

    training: str
    base: str
    trained: str
    analysis: str


def demo(settings: Settings, *, steps: int = STEPS, port: int | None = None, stay: bool | None = None) -> None:
    """Start the service, run the demo on it, and keep serving in a terminal until Ctrl-C.

    Args:
        stay: keep serving afterwards; by default if standard input and output are a terminal.

    Raises:
        SystemExit: with the reason, if a job fails; 130 if it is interrupted before its end.
    """
    from service.cli.up import running

    console = make_console()
    keep = sys.stdin.isatty() and sys.stdout.isatty() if stay is None else stay
    started, is_over = time.monotonic(), False
    try:
        with running(settings, port=port) as url:
            console.print(f"ERPO Lab runs at [bold]{url}[/] (data in {settings.data_dir})")
            with ErpoClient(url) as client:
                play(client, console, steps=steps)
            is_over = True
            console.print(f"[dim]The demo took {clock(time.monotonic() - started)}.[/]")
            if not keep:
                console.print("The service ends with the demo: [bold]make up[/] starts it again, with these pages.")
                return
            console.print("The service goes on. [bold]Ctrl-C[/] stops it.")
            _wait_for_interrupt()
    except (JobFailed, ErpoApiError, ErpoError) as error:
        raise SystemExit(f"erpo demo: {error}") from None
    except KeyboardInterrupt:
        console.print("Stopped.")
        if not is_over:
            raise SystemExit(130) from None


def make_console() -> Console:
    """Colours everywhere: a terminal gets those it can show, a pipe or file true colour, unless NO_COLOR is set."""
    if sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return Console(highlight=False)
    width = int(os.environ.get("COLUMNS") or 100)
    return Console(force_terminal=False, color_system="truecolor", width=width, highlight=False)


def play(client: ErpoClient, console: Console, *, steps: int = STEPS) -> DemoRuns:
    """The demo on a running service.

    Raises:
        JobFailed: a job did not succeed.
        ErpoApiError: the service refused something.
    """
    console.rule("[bold]Train", align="left")
    console.print(f"ERPO with LoRA on {MODEL}: sums of two numbers, {steps} steps of 32 answers.")
    training = client.train(**training_spec(steps))
    console.print(f"[dim]{client.base_url}/runs/{training.run_id}[/]")
    _follow(console, training, "ERPO")

    console.rule("[bold]Evaluate", align="left")
    base = client.evaluate(**evaluation_spec(MODEL, "base"))
    _follow(console, base, "base model")
    adapter = {"run": training.run_id}
    trained = client.evaluate(**evaluation_spec(adapter, "ERPO"))
    _follow(console, trained, "ERPO model")

    console.rule("[bold]Analyse", align="left")
    texts = answers_to_analyse(client, trained.run_id)
    analysis = client.analyze_entropy(
        model=adapter, texts=texts, prompt=prompt_spec(), job={"name": "Demo: where the trained model hesitates"}
    )
    _follow(console, analysis, "entropy")

    runs = DemoRuns(training.run_id, base.run_id, trained.run_id, analysis.run_id)
    show(client, console, runs)
    return runs


def training_spec(steps: int) -> dict[str, Any]:
    """The body of `POST /jobs/train`."""
    return {
        "algorithm": "erpo",
        "model": MODEL,
        "dataset": TRAINING_SET,
        "prompt": prompt_spec(),
        # docs/algorithm.md tells of the comparison that eta comes from.
        "num_generations": 4,
        "generation_batch_size": 32,
        "synthesis_weight": 0.1,
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "max_steps": steps,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "beta": 0.0,
        "trace_every": 2,
        "save_steps": max(1, steps),
        "job": {"name": "Demo: ERPO on two-number sums"},
    }


def evaluation_spec(model: Any, label: str) -> dict[str, Any]:
    """The body of `POST /jobs/evaluate`: the same problems and the same seed for every model."""
    return {
        "model": model,
        "dataset": HELD_OUT_SET,
        "prompt": prompt_spec(),
        "sampling": {"temperature": 1.0, "max_completion_length": MAX_COMPLETION_LENGTH, "seed": 7},
        "num_samples": 2,
        "pass_at": [1, 2],
        "batch_size": 64,
        "job": {"name": f"Demo: {label} on held-out sums"},
    }


def prompt_spec() -> dict[str, Any]:
    """Two solved problems before each question."""
    return {"worked_examples": [example.model_dump() for example in ARITHMETIC]}


def answers_to_analyse(client: ErpoClient, evaluation: str, count: int = 6) -> list[dict[str, str]]:
    """Some of the trained model's answers, one a problem."""
    texts, seen = [], set()
    for row in answered(client, evaluation):
        if row["prompt_id"] in seen or not row["completion"]:
            continue
        seen.add(row["prompt_id"])
        texts.append({"prompt": question_of(row["prompt"]), "response": row["completion"]})
    return texts[:count]


def answered(client: ErpoClient, evaluation: str) -> list[dict[str, Any]]:
    """Sampled answers of an evaluation with their verdicts."""
    return client.evaluations.items(evaluation, limit=200)["data"]


def question_of(prompt: str) -> str:
    """The problem of a stored prompt: what the last user turn says, or all of it where there are no turns."""
    last_turn = prompt.rpartition("<|im_start|>user\n")[2]
    return last_turn.partition("<|im_end|>")[0].strip()


def show(client: ErpoClient, console: Console, runs: DemoRuns) -> None:
    """What came out: curves, table, coloured answer, addresses."""
    console.rule("[bold]What came out", align="left")
    show_curves(client, console, runs.training)
    base, trained = (client.evaluations.get(run)["result"] or {} for run in (runs.base, runs.trained))
    console.print(comparison(base, trained))
    console.print(wording(base, trained), end="\n\n")
    show_answer(client, console, runs)
    show_addresses(client, console, runs)


def show_curves(client: ErpoClient, console: Console, training: str) -> None:
    """Reward and entropy over the training, side by side where there is room."""
    series = client.runs.metrics(training, names=["reward", "entropy"])["series"]
    grid = Table.grid(padding=(0, 3))
    drawn = []
    for name, title, style in (("reward", "reward", "green"), ("entropy", "entropy, nats", "red")):
        one = series.get(name, {"step": [], "value": []})
        drawn.append(curve(one["step"], one["value"], title=title, style=style, width=36, height=6))
    if console.width >= 95:
        grid.add_row(*drawn)
        console.print(grid)
    else:
        console.print(*drawn, sep="\n\n")
    console.print()


def show_answer(client: ErpoClient, console: Console, runs: DemoRuns, count: int = 3) -> None:
    """The analysed answers that hesitate most, coloured by token entropy on one scale."""
    sequences = client.entropy.sequences(runs.analysis)["data"]
    right = {(question_of(row["prompt"]), row["completion"]): row["reward"] for row in answered(client, runs.trained)}
    if not sequences:
        console.print("No answer was analysed.")
        return
    sequences.sort(key=lambda sequence: (sequence.get("stats") or {}).get("h_max") or 0.0, reverse=True)
    shown = sequences[:count]
    bodies = [client.entropy.tokens(runs.analysis, one["n"], channels=["entropy"]) for one in shown]
    high = nice_domain([h for body in bodies for h in body["channels"]["entropy"] if h is not None])
    console.print("[bold]Answers of the trained model that hesitate most, coloured by token entropy[/]")
    for one, body in zip(shown, bodies, strict=True):
        question = question_of(one["prompt"])
        console.print(f"[dim]{escape(question)}[/]  {verdict(right.get((question, one['completion'])))}")
        pivots = [pivot["position"] for pivot in body["pivots"]]
        console.print(token_text(body["tokens"], body["channels"]["entropy"], pivots, high=high), end="\n\n")
    console.print(legend(high), end="\n\n")


def verdict(reward: float | None) -> str:
    """A mark for an answer."""
    return "" if reward is None else "[green]✓ right[/]" if reward else "[red]✗ wrong[/]"


def show_addresses(client: ErpoClient, console: Console, runs: DemoRuns) -> None:
    """Where the same can be looked at in a browser."""
    pages = (
        ("all jobs", ""),
        ("training run", f"runs/{runs.training}"),
        ("evaluation, base", f"runs/{runs.base}"),
        ("evaluation, ERPO", f"runs/{runs.trained}"),
        ("token entropy", f"analyze/entropy/{runs.analysis}"),
    )
    console.print("[bold]Pages[/]")
    for label, path in pages:
        console.print(f"  {label:<17} {client.base_url}/{path}", soft_wrap=True)


def _follow(console: Console, job: JobHandle, label: str) -> None:
    with job_progress(console, label) as take:
        job.wait(on_event=take, raise_on_failure=True)


def _wait_for_interrupt() -> None:
    while True:
        time.sleep(3600)
