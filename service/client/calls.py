"""Every route of the API as a request value. Both clients take their methods from here, so they cannot differ."""

from collections.abc import Sequence
from typing import Any

from service.client.protocol import Call, call


def submit(path: str, body: dict[str, Any], *, dry_run: bool = False, wait: float | None = None) -> Call:
    """A job order."""
    return call("POST", path, json=body, dry_run=dry_run or None, wait=wait)


class JobCalls:
    """Under ``/jobs``."""

    def list(self, **filters: Any) -> Call:
        """A page of jobs; filters: kind, status, tag, model, created_after, created_before, cursor, limit."""
        return call("GET", "/jobs", **filters)

    def get(self, job_id: str) -> Call:
        """One job."""
        return call("GET", f"/jobs/{job_id}")

    def cancel(self, job_id: str, mode: str = "checkpoint") -> Call:
        """Stop it: ``checkpoint`` writes one first, ``now`` does not."""
        return call("POST", f"/jobs/{job_id}/cancel", json={"mode": mode})

    def pause(self, job_id: str) -> Call:
        """Write a checkpoint and stop until :meth:`resume`."""
        return call("POST", f"/jobs/{job_id}/pause")

    def resume(self, job_id: str) -> Call:
        """Go on with a paused job."""
        return call("POST", f"/jobs/{job_id}/resume")

    def retry(self, job_id: str) -> Call:
        """Queue a failed or cancelled job again."""
        return call("POST", f"/jobs/{job_id}/retry")

    def update(self, job_id: str, **changes: Any) -> Call:
        """Change name, tags or priority."""
        return call("PATCH", f"/jobs/{job_id}", json=changes)

    def delete(self, job_id: str) -> Call:
        """Hide a finished job."""
        return call("DELETE", f"/jobs/{job_id}")

    def events(self, job_id: str, *, after: int = 0, limit: int = 200) -> Call:
        """A page of its events."""
        return call("GET", f"/jobs/{job_id}/events", after=after, limit=limit)

    def logs(self, job_id: str) -> Call:
        """Its log as text."""
        return call("GET", f"/jobs/{job_id}/logs", accept="text/plain")


class RunCalls:
    """Under ``/runs``."""

    def list(self, **filters: Any) -> Call:
        """A page of runs."""
        return call("GET", "/runs", **filters)

    def get(self, run_id: str) -> Call:
        """One run: specification, what it resolved to, summary, result."""
        return call("GET", f"/runs/{run_id}")

    def metrics(self, run_id: str, **query: Any) -> Call:
        """Its metric series; query: names, step_min, step_max, max_points, smoothing."""
        return call("GET", f"/runs/{run_id}/metrics", **query)

    def completions(self, run_id: str, **query: Any) -> Call:
        """A page of sampled answers; query: step, cursor, limit."""
        return call("GET", f"/runs/{run_id}/completions", **query)

    def checkpoints(self, run_id: str, **query: Any) -> Call:
        """Its checkpoints."""
        return call("GET", f"/runs/{run_id}/checkpoints", **query)

    def evaluations(self, run_id: str, **query: Any) -> Call:
        """Evaluations of its checkpoints."""
        return call("GET", f"/runs/{run_id}/evaluations", **query)

    def traces(self, run_id: str, **query: Any) -> Call:
        """A page of its recorded sequences; query: step, cursor, limit."""
        return call("GET", f"/runs/{run_id}/traces", **query)

    def trace_tokens(self, run_id: str, n: int, **query: Any) -> Call:
        """Tokens and channels of sequence ``n``; query: channels, start, end."""
        return call("GET", f"/runs/{run_id}/traces/{n}/tokens", **query)

    def checkpoint_archive(self, run_id: str, step: int) -> Call:
        """The files of a checkpoint as a tar archive."""
        return call("GET", f"/runs/{run_id}/checkpoints/{step}/archive", accept="application/x-tar")


class EvaluationCalls:
    """Under ``/evaluations``."""

    def get(self, run_id: str, **query: Any) -> Call:
        """One evaluation; ``result`` holds its numbers. ``pass_at``, ``truncated_boxed``: computed anew."""
        return call("GET", f"/evaluations/{run_id}", **query)

    def verify(self, run_id: str) -> Call:
        """Judge its stored answers again; the answer is a job whose run is an evaluation of its own."""
        return call("POST", f"/evaluations/{run_id}/verify")

    def items(self, run_id: str, **query: Any) -> Call:
        """A page of its answers; query: verdict, prompt_id, cursor, limit."""
        return call("GET", f"/evaluations/{run_id}/items", **query)

    def problems(self, run_id: str, **query: Any) -> Call:
        """A page of its problems with the counts of their answers."""
        return call("GET", f"/evaluations/{run_id}/problems", **query)

    def compare(self, run_ids: Sequence[str]) -> Call:
        """Paired differences to the first on each benchmark, with intervals and tests."""
        return call("GET", "/evaluations/compare", repeated={"evaluation": run_ids})

    def report(self, run_ids: Sequence[str], *, format: str = "json", **query: Any) -> Call:
        """A table for a paper; ``format``: json, markdown, csv, latex; query: table, paper."""
        return call(
            "GET", "/evaluations/report", accept="*/*", format=format, repeated={"evaluation": run_ids}, **query
        )


class EntropyCalls:
    """Under ``/analyze/entropy``."""

    def get(self, run_id: str) -> Call:
        """One analysis."""
        return call("GET", f"/analyze/entropy/{run_id}")

    def sequences(self, run_id: str, **query: Any) -> Call:
        """A page of its sequences."""
        return call("GET", f"/analyze/entropy/{run_id}/sequences", **query)

    def tokens(self, run_id: str, n: int, **query: Any) -> Call:
        """Tokens and channels of sequence ``n``; query: channels, start, end."""
        return call("GET", f"/analyze/entropy/{run_id}/sequences/{n}/tokens", **query)

    def cdps(self, run_id: str, top: int = 100, **detector: Any) -> Call:
        """The pivots of highest entropy of the whole analysis; query: detector, scope, fraction, threshold, ..."""
        return call("GET", f"/analyze/entropy/{run_id}/cdps", top=top, **detector)

    def words(self, run_id: str, top: int = 100, **detector: Any) -> Call:
        """Which tokens the pivots are."""
        return call("GET", f"/analyze/entropy/{run_id}/words", top=top, **detector)

    def export(self, run_id: str, format: str = "parquet") -> Call:
        """The whole analysis as one file: ``parquet``, ``npz`` or ``html``."""
        return call("GET", f"/analyze/entropy/{run_id}/export", accept="*/*", format=format)

    def histogram(self, run_id: str) -> Call:
        """The entropy histogram of the whole analysis."""
        return call("GET", f"/analyze/entropy/{run_id}/histogram")


class PerturbationCalls:
    """Under ``/analyze/perturbation``."""

    def get(self, run_id: str) -> Call:
        """One perturbation; ``result`` holds arms and contrasts."""
        return call("GET", f"/analyze/perturbation/{run_id}")

    def outcomes(self, run_id: str, **query: Any) -> Call:
        """A page of its continuations; query: cursor, limit."""
        return call("GET", f"/analyze/perturbation/{run_id}/outcomes", **query)


class BranchCalls:
    """Under ``/analyze/branch``."""

    def get(self, run_id: str) -> Call:
        """One tree; ``result`` holds the alternatives and their success."""
        return call("GET", f"/analyze/branch/{run_id}")

    def outcomes(self, run_id: str, **query: Any) -> Call:
        """A page of its continuations; query: cursor, limit."""
        return call("GET", f"/analyze/branch/{run_id}/outcomes", **query)


class DatasetCalls:
    """Under ``/datasets``."""

    def list(self, **query: Any) -> Call:
        """Uploaded data sets and the kinds of references."""
        return call("GET", "/datasets", **query)

    def upload(self, filename: str, content: bytes, name: str | None = None) -> Call:
        """Upload JSONL: one object with ``problem`` and ``answer`` a line."""
        return call("POST", "/datasets", files={"file": (filename, content, "application/jsonl")}, name=name)


class RegistryCalls:
    """Models, workers, health."""

    def models(self) -> Call:
        """Names that may stand as ``model``."""
        return call("GET", "/models")

    def benchmarks(self) -> Call:
        """Benchmarks that may stand as ``dataset``, and whether their problems are there."""
        return call("GET", "/benchmarks")

    def workers(self) -> Call:
        """Workers and when they were last heard of."""
        return call("GET", "/workers")

    def ready(self) -> Call:
        """Database, broker and workers."""
        return call("GET", "/readyz")


GROUPS: dict[str, type] = {
    "jobs": JobCalls,
    "runs": RunCalls,
    "evaluations": EvaluationCalls,
    "entropy": EntropyCalls,
    "perturbation": PerturbationCalls,
    "branch": BranchCalls,
    "datasets": DatasetCalls,
    "registries": RegistryCalls,
}
