"""An analysis of log-probabilities as an engine exports them: intervals around what the whole distributions say."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from erpo_core.analysis.given_logprobs import run_given_logprobs
from erpo_core.codec import decode_trace
from erpo_core.errors import SpecError
from erpo_core.job import JobInputs, ModelInput
from erpo_core.records import Result, Trace, from_wire, to_wire
from erpo_core.specs.entropy import EntropySpec

RUNNING = SimpleNamespace(requested=False)
VOCABULARY = 300
TEXT = ["We", " add", ":", " 🙂", " 1", "+", "1", " =", " 2", "."]


def distributions(seed: int = 0) -> np.ndarray:
    """(tokens, V) probabilities, certain and uncertain ones."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.dirichlet(np.full(VOCABULARY, 10.0 ** rng.uniform(-2.5, 0))) for _ in TEXT])


def exported(p: np.ndarray, written: list[int], k: int = 5) -> list[dict]:
    """``choices[0].logprobs.content`` of such distributions."""
    logps = np.log(np.maximum(p, 1e-300))
    content = []
    for row, index, text in zip(logps, written, TEXT, strict=True):
        best = np.argsort(-row)[:k]
        names = {int(i): text if i == index else f"t{i}" for i in [*best, index]}
        top = [{"token": names[int(i)], "logprob": float(row[i])} for i in best]
        content.append({"token": text, "logprob": float(row[index]), "bytes": list(text.encode()), "top_logprobs": top})
    return content


def run(texts: list[dict], stored=(), **body) -> tuple[list[Trace], dict]:
    spec = EntropySpec.model_validate(
        {"model": "an engine", "logprobs": {"vocab_size": VOCABULARY, "texts": texts}} | body
    )
    inputs = JobInputs("j", "r", 1, Path("w"), Path("c"), ModelInput("an engine"), stored_traces=tuple(stored))
    sent = []
    sink = SimpleNamespace(emit=lambda record: sent.append(from_wire(*to_wire(record))))
    result = run_given_logprobs(spec, inputs, sink, RUNNING)
    assert [record.data for record in sent if isinstance(record, Result)] == [result]
    return [record for record in sent if isinstance(record, Trace)], result


@pytest.mark.parametrize("rank", [0, 3, 40], ids=["likeliest", "in the list", "beyond the list"])
def test_every_entropy_lies_between_its_bounds(rank):
    p = distributions()
    (trace,), result = run([{"content": exported(p, np.argsort(-p, axis=1)[:, rank].tolist())}])
    columns = decode_trace(trace.payload)
    exact = -(p * np.log(np.maximum(p, 1e-300))).sum(axis=1)
    assert (columns["entropy_low"] <= exact + 1e-6).all()
    assert (exact <= columns["entropy_high"] + 1e-6).all()
    assert (columns["entropy_low"] < columns["entropy_high"]).any()
    np.testing.assert_allclose(columns["top_prob"], p.max(axis=1), rtol=1e-3)
    assert result["entropy_low"]["mean"] <= exact.mean() <= result["entropy_high"]["mean"]


def test_nothing_is_called_an_entropy_and_everything_says_that_it_is_not_exact():
    p = distributions()
    (trace,), result = run([{"content": exported(p, p.argmax(axis=1).tolist()), "prompt": "Add."}])
    columns = decode_trace(trace.payload)
    assert "entropy" not in columns
    assert "token_ids" not in columns
    assert (trace.meta["exact"], result["exact"], "entropy" in result) == (False, False, False)
    assert "h_mean" not in trace.meta["stats"]
    assert trace.meta["histogram"] == []
    assert trace.meta["completion"] == "".join(TEXT)
    assert trace.meta["prompt"] == "Add."


def test_pivots_are_those_of_the_lower_bound_with_what_was_listed():
    p = distributions()
    (trace,), _ = run([{"content": exported(p, p.argmax(axis=1).tolist())}], detector={"fraction": 0.2})
    low = decode_trace(trace.payload)["entropy_low"]
    assert [pivot["position"] for pivot in trace.meta["pivots"]] == sorted(np.argsort(-low)[:2])
    for pivot in trace.meta["pivots"]:
        logps = [other["logp"] for other in pivot["alternatives"]]
        assert logps == sorted(logps, reverse=True)
        assert np.exp(logps[0]) == pytest.approx(p[pivot["position"]].max())


def test_a_token_whose_log_probability_was_not_given_has_none():
    p = distributions()
    content = exported(p, p.argmax(axis=1).tolist())
    content[4]["logprob"] = -9999.0
    (trace,), _ = run([{"content": content}])
    logps = decode_trace(trace.payload)["logp"]
    assert np.flatnonzero(np.isnan(logps)).tolist() == [4]


def test_bytes_of_one_character_sit_on_its_first_token():
    parts = ["🙂".encode()[:2], "🙂".encode()[2:]]
    top = [{"token": "a", "logprob": 0.0}]
    content = [{"token": "\ufffd", "logprob": 0.0, "bytes": list(part), "top_logprobs": top} for part in parts]
    (trace,), _ = run([{"content": content}])
    assert trace.meta["tokens"] == ["🙂", ""]


def test_stored_traces_are_not_stored_again():
    p = distributions()
    texts = [{"content": exported(p, p.argmax(axis=1).tolist())}] * 3
    traces, expected = run(texts)
    again, result = run(texts, stored=[{"prompt_id": t.meta["prompt_id"], "sample": 0} for t in traces[:2]])
    assert [t.meta["prompt_id"] for t in again] == ["prompt-2"]
    assert result == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logprob": -0.1}, "not among the likeliest"),
        ({"top_logprobs": [{"token": "a", "logprob": -0.1}, {"token": "b", "logprob": -0.1}]}, "add up to"),
        ({"top_logprobs": [{"token": "a", "logprob": -2.0}, {"token": "b", "logprob": -12.0}]}, "not the likeliest"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_log_probabilities_of_no_distribution_are_refused_by_their_place(change, words):
    good = {"token": "a", "logprob": -2.0, "top_logprobs": [{"token": "a", "logprob": -2.0}]}
    with pytest.raises(SpecError, match=words) as refused:
        run([{"content": [good]}, {"content": [good, good | change]}])
    assert refused.value.pointer == "/logprobs/texts/1/content/1/top_logprobs"
