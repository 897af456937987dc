"""Live progress of a job from its event stream: a bar in a terminal, a line a step elsewhere."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

_PHASES = {
    "load": "loading the model",
    "train": "training",
    "evaluate": "evaluating the policy",
    "generate": "sampling answers",
    "score": "scoring",
    "verify": "checking answers",
    "save": "saving",
}


class _Facts(ProgressColumn):
    """Reward, entropy, speed and the time that is left, as far as they are known."""

    def render(self, task) -> Text:
        return Text(facts(task.fields.get("data") or {}), style="cyan")


def facts(data: dict[str, Any]) -> str:
    """One line out of a progress event's numbers."""
    parts = []
    if data.get("reward") is not None:
        parts.append(f"reward {data['reward']:.2f}")
    if data.get("acc") is not None:
        parts.append(f"accuracy so far {data['acc']:.2f}")
    if data.get("entropy") is not None:
        parts.append(f"entropy {data['entropy']:.3f}")
    if data.get("sampled_answers") is not None:
        parts.append(f"{data['sampled_answers']} answers, {data['sampled_tokens']} tokens sampled")
    elif data.get("tokens_per_second"):
        parts.append(f"{data['tokens_per_second']:.0f} tokens/s")
    if data.get("eta_seconds") is not None:
        parts.append(f"{clock(data['eta_seconds'])} left")
    return " · ".join(parts)


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def job_progress(console: Console, label: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields what to call with every event of the job."""
    if not console.is_terminal:
        yield _Lines(console, label).take
        return
    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        _Facts(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=1, data={})

        def take(event: dict[str, Any]) -> None:
            data = event.get("data") or {}
            if event["type"] == "progress":
                phase = _PHASES.get(data["phase"], data["phase"])
                total = max(1, data["total"])
                done = min(data["done"], total)
                progress.update(task, description=f"{label}: {phase}", completed=done, total=total, data=data)
            elif event["type"] == "job.status" and data.get("to") == "succeeded":
                done = progress.tasks[task].total
                progress.update(task, description=label, completed=done, data={**_without_eta(progress, task)})

        yield take


def _without_eta(progress: Progress, task) -> dict[str, Any]:
    data = progress.tasks[task].fields.get("data") or {}
    return {name: value for name, value in data.items() if name != "eta_seconds"}


class _Lines:
    """Where nothing can be drawn over: one line whenever the phase or the step changes, some 25 a phase at most."""

    def __init__(self, console: Console, label: str) -> None:
        self.console, self.label, self.shown = console, label, (None, -1)

    def take(self, event: dict[str, Any]) -> None:
        if event["type"] != "progress":
            return
        data = event["data"]
        phase, done, total = data["phase"], data["done"], data["total"]
        last_phase, last_done = self.shown
        if phase == last_phase and (done == last_done or (done < total and done - last_done < total / 25)):
            return
        self.shown = (phase, done)
        line = f"  {self.label}: {_PHASES.get(phase, phase)} {done}/{total}  {facts(data)}"
        self.console.print(line.rstrip(), highlight=False, markup=False)
