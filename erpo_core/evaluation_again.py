"""Stored answers of an evaluation, judged by the verifier of today: an evaluation of its own that samples nothing."""

from typing import Any

from erpo_core.evaluation_answers import credited
from erpo_core.evaluation_identity import evaluation_identity
from erpo_core.evaluation_summary import summarise
from erpo_core.job import JobInputs, Stop, leave_if_asked
from erpo_core.records import Completions, Progress, Resolved, Result, Sink
from erpo_core.rewards.verify import Verifier, verifier_version
from erpo_core.specs.evaluate import EvaluateSpec

_TOGETHER = 256
_PROCESSES = 2


def judge_again(spec: EvaluateSpec, inputs: JobInputs, sink: Sink, stop: Stop) -> dict[str, Any]:
    """Judge the answers of ``inputs.source``; emits Resolved, Progress, Completions and Result, which it returns.

    Raises:
        LeftEarlyError: asked to leave: what it has judged so far is stored.
        RunError: ``verifier_unavailable``.
    """
    resolved, answers = inputs.source["resolved"], inputs.source["answers"]
    identity = evaluation_identity(spec, resolved, verifier_version())
    sink.emit(Resolved(resolved | {"answers_of": spec.answers_of, "identity": identity}))
    rows = list(inputs.stored_rows)
    fresh = [row for row in answers if (row["prompt_id"], row["sample"]) not in inputs.stored]
    with Verifier(processes=_PROCESSES) as verifier:
        for start in range(0, len(fresh), _TOGETHER):
            sink.emit(Progress("verify", len(rows), len(answers)))
            leave_if_asked(stop)
            block = fresh[start : start + _TOGETHER]
            verdicts = verifier.check_many([(row["gold"] or "", row["completion"]) for row in block])
            judged = [credited(row | {"verdict": str(v)}, spec) for row, v in zip(block, verdicts, strict=True)]
            sink.emit(Completions(0, judged))
            rows += judged
    result = summarise(rows, spec)
    sink.emit(Result(result))
    return result
