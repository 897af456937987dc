"""Analyses over HTTP: what may be ordered, pivots found anew, words, outcomes, and the analysis as a file."""

import csv
import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from db_rows import claim, finish, store, submit

from erpo_core.analysis.detectors import find_pivots
from erpo_core.analysis.given_logprobs import run_given_logprobs
from erpo_core.analysis.statistics import sequence_stats
from erpo_core.codec import encode_trace
from erpo_core.job import JobInputs, ModelInput
from erpo_core.records import Completions, Result, Trace, from_wire, to_wire
from erpo_core.specs.entropy import DetectorSpec, EntropySpec

EVIL = "</script><img src=x onerror=alert(1)>\u2028"
WORDS = [" so", " wait", " thus", EVIL, " 4", " 2", ".", "<|im_end|>"]
SIZES = (300, 700, 40)
MODEL = {"model": "smollm2-135m"}
PERTURBATION = MODEL | {"dataset": "data:sums.jsonl"}


def columns(n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(n)
    size = SIZES[n]
    found = {"token_ids": rng.integers(0, 50_000, size), "entropy": rng.exponential(size=size).astype(np.float32)}
    found["entropy"][-1] = 50.0  # a special token: counted nowhere
    return found | {"logp": -rng.exponential(size=size).astype(np.float16), "rank": rng.integers(0, 70_000, size)}


def tokens(n: int) -> list[str]:
    return [WORDS[i] for i in np.random.default_rng(100 + n).integers(0, 7, SIZES[n] - 1)] + [WORDS[7]]


def entropies(n: int) -> np.ndarray:
    values = columns(n)["entropy"].astype(np.float64)
    values[-1] = np.nan
    return values


def pivots_of(detector: DetectorSpec) -> dict[tuple[int, int], float]:
    """(sequence, position) -> entropy, by the detector itself."""
    found = find_pivots([entropies(n) for n in range(3)], detector, [0, 0, 1])
    return {(n, int(p)): float(entropies(n)[p]) for n, positions in enumerate(found) for p in positions}


def trace(n: int) -> Trace:
    stats, histogram = sequence_stats(entropies(n)[:-1])
    texts = tokens(n)
    pivots = [
        {"position": p, "entropy": h, "logp": -1.0, "token": texts[p], "alternatives": []}
        for (sequence, p), h in pivots_of(DetectorSpec()).items()
        if sequence == n
    ]
    meta = {"prompt_id": f"prompt-{n}", "group": n // 2, "sample": n % 2, "prompt": EVIL, "completion": "".join(texts)}
    meta |= {"num_tokens": SIZES[n], "tokens": texts, "stats": stats, "histogram": histogram, "group_stats": {}}
    meta |= {"pivots": pivots, "special_positions": [SIZES[n] - 1], "gold": "42", "tokenizer_digest": "t"}
    return Trace(0, meta, encode_trace(columns(n)))


@pytest.fixture
def analysis(database):
    """A finished entropy analysis of three sequences; its claim."""
    submit(database, "entropy", spec=MODEL | {"prompts": ["1 + 1?"], "prompt": {"template": "raw"}})
    owned = claim(database)
    store(database, owned, *(trace(n) for n in range(3)), Result({"num_tokens": sum(SIZES)}))
    finish(database, owned, "succeeded")
    return owned


@pytest.mark.parametrize(
    "detector",
    [
        DetectorSpec(),
        DetectorSpec(fraction=0.2, scope="run"),
        DetectorSpec(kind="absolute", threshold=2.5),
        DetectorSpec(kind="zscore", scope="group", threshold=3.0),
        DetectorSpec(kind="transient", threshold=4.0, min_entropy=1.0),
    ],
    ids=lambda d: f"{d.kind}-{d.scope}",
)
def test_pivots_are_found_anew_from_what_is_stored(api, analysis, detector):
    query = detector.model_dump(exclude={"kind"}, exclude_none=True) | {"detector": detector.kind, "top": 1000}
    body = api.get(f"/analyze/entropy/{analysis.run_id}/cdps", params=query).json()
    found = {(row["n"], row["position"]): row["entropy"] for row in body["data"]}
    assert found == pytest.approx(pivots_of(detector))
    assert [row["entropy"] for row in body["data"]] == sorted(found.values(), reverse=True)
    assert all(row["token"] == tokens(row["n"])[row["position"]] for row in body["data"])
    if detector == DetectorSpec():
        stored = api.get(f"/analyze/entropy/{analysis.run_id}/cdps", params={"top": 1000}).json()
        assert [(r["n"], r["position"]) for r in stored["data"]] == [(r["n"], r["position"]) for r in body["data"]]


@pytest.mark.parametrize("query", [{}, {"detector": "quantile", "fraction": 1}])
def test_words_are_counted_over_all_pivots(api, analysis, query):
    body = api.get(f"/analyze/entropy/{analysis.run_id}/words", params=query).json()["data"]
    expected = pivots_of(DetectorSpec(fraction=query.get("fraction", 0.05)))
    assert sum(row["count"] for row in body) == len(expected)
    assert sum(row["share"] for row in body) == pytest.approx(1)
    assert [row["count"] for row in body] == sorted((row["count"] for row in body), reverse=True)
    best = body[0]
    own = {k: h for k, h in expected.items() if tokens(k[0])[k[1]] == best["token"]}
    assert best["count"] == len(own)
    assert best["mean_entropy"] == pytest.approx(np.mean(list(own.values())))
    assert best["mean_progress"] == pytest.approx(np.mean([p / SIZES[n] for n, p in own]))


@pytest.mark.parametrize(("name", "value"), [("detector", "magic"), ("fraction", "2"), ("min_entropy", "-1")])
def test_a_detector_out_of_range_is_refused(api, analysis, name, value):
    query = {"detector": "quantile"} | {name: value}
    answer = api.get(f"/analyze/entropy/{analysis.run_id}/cdps", params=query)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, f"/query/{name}")


def test_parquet_has_a_row_for_every_token(api, analysis, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    answer = api.get(f"/analyze/entropy/{analysis.run_id}/export", params={"format": "parquet"})
    table = parquet.read_table(io.BytesIO(answer.content)).to_pydict()
    assert answer.headers["content-type"] == "application/vnd.apache.parquet"
    assert len(table["n"]) == sum(SIZES)
    assert table["token"] == [text for n in range(3) for text in tokens(n)]
    assert table["token_id"] == np.concatenate([columns(n)["token_ids"] for n in range(3)]).tolist()
    assert table["entropy"] == np.concatenate([columns(n)["entropy"] for n in range(3)]).tolist()
    pivots = {
        (n, p) for n, p, is_pivot in zip(table["n"], table["position"], table["is_pivot"], strict=True) if is_pivot
    }
    assert pivots == set(pivots_of(DetectorSpec()))


def test_npz_loads_without_pickle_and_is_cut_by_its_offsets(api, analysis):
    answer = api.get(f"/analyze/entropy/{analysis.run_id}/export", params={"format": "npz"})
    arrays = np.load(io.BytesIO(answer.content), allow_pickle=False)
    assert arrays["offsets"].tolist() == [0, *np.cumsum(SIZES)]
    for n in range(3):
        part = slice(*arrays["offsets"][n : n + 2])
        np.testing.assert_array_equal(arrays["entropy"][part], columns(n)["entropy"])
        np.testing.assert_array_equal(arrays["token_ids"][part], columns(n)["token_ids"])
    sequences = [json.loads(line) for line in arrays["sequences.jsonl"].splitlines()]
    assert [row["completion"] for row in sequences] == ["".join(tokens(n)) for n in range(3)]
    assert arrays["pivots"].sum() == len(pivots_of(DetectorSpec()))


def test_a_saved_page_needs_nothing_and_holds_no_markup_of_a_model(api, analysis):
    page = api.get(f"/analyze/entropy/{analysis.run_id}/export", params={"format": "html"})
    assert "attachment" in page.headers["content-disposition"]
    assert EVIL[:9] not in page.text.split('id="answers">')[1].split("</script>")[0]
    assert "<img src=x" not in page.text
    packed = json.loads(re.search(r'id="answers">(.*?)</script>', page.text, re.DOTALL)[1])
    home = f"/analyze/entropy/{analysis.run_id}"
    for path, body in packed.items():
        assert body["data" if "data" in body else "n" if "n" in body else "id"] is not None
        assert path.startswith(home)
    assert packed[f"{home}/sequences/1/tokens"] == api.get(f"{home}/sequences/1/tokens").json()
    assert not re.search(r'(src|href)="(?!data:|/docs|#)', page.text)


def test_parquet_without_its_library_says_what_to_do(api, analysis, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    answer = api.get(f"/analyze/entropy/{analysis.run_id}/export", params={"format": "parquet"})
    assert (answer.status_code, answer.json()["code"]) == (501, "format_unavailable")
    assert "npz" in answer.json()["detail"]


def test_outcomes_are_a_table(api, database):
    submit(database, "perturbation")
    owned = claim(database)
    rows = [
        {"prompt_id": f"{g}/high/7/11>12", "sample": k, "completion": 'a, "b"\nc', "reward": 1.0, "verdict": "right"}
        | {"truncated": False, "num_tokens": 9}
        for g in range(150)
        for k in range(2)
    ]
    attempts = [{"prompt_id": "0", "sample": 0, "completion": "2", "reward": 1.0, "verdict": "right"}]
    store(database, owned, Completions(1, attempts), Completions(0, rows), Result({"contrasts": []}))
    table = api.get(f"/analyze/perturbation/{owned.run_id}/outcomes.csv")
    lines = list(csv.DictReader(io.StringIO(table.text)))
    assert len(lines) == 300
    assert (lines[-1]["problem"], lines[-1]["arm"], lines[-1]["edit"]) == ("149", "high", "11>12")
    assert lines[0]["completion"] == 'a, "b"\nc'
    assert api.get(f"/analyze/perturbation/{owned.run_id}").json()["result"] == {"contrasts": []}
    assert len(api.get(f"/analyze/perturbation/{owned.run_id}/outcomes").json()["data"]) == 50
    solved = api.get(f"/runs/{owned.run_id}/completions", params={"step": 1}).json()["data"]
    assert [row["prompt_id"] for row in solved] == ["0"]
    other = api.get(f"/analyze/branch/{owned.run_id}")
    assert (other.status_code, f"/analyze/perturbation/{owned.run_id}" in other.json()["detail"]) == (404, True)


def refused(answer, pointer: str, words: str) -> None:
    body = answer.json()
    assert answer.status_code == 422, body
    assert body["errors"][0]["pointer"] == pointer, body
    assert words in body["errors"][0]["message"] + body["errors"][0]["mend"]


@pytest.mark.parametrize(
    ("change", "pointer", "words"),
    [
        ({"arms": ["high"]}, "/arms", "at least 2"),
        ({"arms": ["high", "high"]}, "/arms", "twice"),
        ({"arms": ["high", "middle"]}, "/arms/1", "random_matched"),
        ({"policy": "truncate", "mode": "edit_all"}, "/policy", "branch_one"),
        ({"surprisal_band": [3, 2]}, "/surprisal_band", "low < high"),
        ({"sampling": {"temperature": 0}}, "/num_attempts", "greedy"),
        ({"fraction": 0.6}, "/fraction", "at most 0.5"),
        ({"dataset": "data:none.jsonl"}, "/dataset", "none.jsonl"),
    ],
    ids=str,
)
def test_a_wrong_perturbation_is_refused(api, change, pointer, words):
    refused(api.post("/analyze/perturbation", json=PERTURBATION | change), pointer, words)


def test_a_perturbation_is_estimated_and_queued(api):
    estimate = api.post("/analyze/perturbation", json=PERTURBATION, params={"dry_run": True}).json()["estimate"]
    assert (estimate["num_problems"], estimate["outcomes"]) == (3, 3 * 5 * 4)
    assert api.post("/analyze/perturbation", json=PERTURBATION).json()["links"]["run"].startswith("/analyze/perturb")


def test_a_branch_names_a_token_of_a_stored_sequence(api, analysis):
    sequence = api.get(f"/analyze/entropy/{analysis.run_id}/sequences").json()["data"][2]["id"]
    body = MODEL | {"sequence": sequence, "position": SIZES[2] - 1}
    assert api.post("/analyze/branch", json=body).status_code == 202
    refused(api.post("/analyze/branch", json=body | {"position": SIZES[2]}), "/position", f"at most {SIZES[2] - 1}")
    refused(api.post("/analyze/branch", json=body | {"sequence": "seq_" + "0" * 32}), "/sequence", "there is no")


def test_stored_answers_are_a_source_if_there_are_any(api, database, analysis):
    submit(database, "evaluate")
    owned = claim(database)
    rows = [{"prompt_id": "p", "sample": k, "completion": "4", "num_tokens": 10} for k in range(5)]
    store(database, owned, Completions(0, rows), Result({}))
    body = MODEL | {"source": {"run": owned.run_id}}
    assert api.post("/analyze/entropy", json=body, params={"dry_run": True}).json()["depends_on"] == [owned.run_id]
    finish(database, owned, "succeeded")
    estimate = api.post("/analyze/entropy", json=body, params={"dry_run": True}).json()["estimate"]
    assert estimate["tokens"] == 50
    refused(api.post("/analyze/entropy", json=body | {"prompts": ["1?"]}), "/prompts", "either")
    refused(
        api.post("/analyze/entropy", json=MODEL | {"source": {"run": analysis.run_id}}), "/source/run", "no answers"
    )
    late = MODEL | {"source": {"run": owned.run_id, "step": 7}}
    refused(api.post("/analyze/entropy", json=late), "/source/step", "step 7")


def test_a_whole_transcript_as_response_is_refused(api):
    texts = [{"prompt": "1?", "response": "1"}, {"prompt": "1?", "response": "<|im_start|>assistant\n1"}]
    refused(api.post("/analyze/entropy", json=MODEL | {"texts": texts}), "/texts/1/response", "the answer alone")


def test_an_order_beyond_the_quota_is_refused_before_it_runs(serve):
    api = serve(max_trace_bytes_per_job=100_000)
    body = MODEL | {"dataset": "data:sums.jsonl", "num_samples": 200}
    refused(api.post("/analyze/entropy", json=body), "", "ERPO_MAX_TRACE_BYTES_PER_JOB")
    assert api.post("/analyze/entropy", json=body | {"num_samples": 1}).status_code == 202


def given_token(text: str, top: float) -> dict:
    """As an engine exports it: the likeliest token and the next, most of the rest unknown."""
    others = [{"token": text, "logprob": top}, {"token": " no", "logprob": top - 3}]
    return {"token": text, "logprob": top, "bytes": None, "top_logprobs": others}


GIVEN = {"vocab_size": 1000, "texts": [{"prompt": "1?", "content": [given_token(" a", -0.1), given_token(" b", -1.0)]}]}

ANYTHING = {"detector": "absolute", "threshold": 0}


@pytest.fixture
def bounded(database):
    """A finished analysis of given log-probabilities; its claim."""
    spec = EntropySpec(model="an engine", logprobs=GIVEN)
    submit(database, "entropy", spec=spec.model_dump(mode="json", exclude={"job"}))
    owned, sent = claim(database), []
    inputs = JobInputs(owned.job_id, owned.run_id, 1, Path("w"), Path("c"), ModelInput("an engine"))
    run_given_logprobs(spec, inputs, SimpleNamespace(emit=sent.append), SimpleNamespace(requested=False))
    store(database, owned, *(from_wire(*to_wire(record)) for record in sent))
    finish(database, owned, "succeeded")
    return owned


def test_given_log_probabilities_are_queued_whoever_they_are_of(api):
    body = {"model": "gpt-something", "logprobs": GIVEN}
    estimate = api.post("/analyze/entropy", json=body, params={"dry_run": True}).json()["estimate"]
    assert (estimate["sequences"], estimate["tokens"]) == (1, 2)
    assert api.post("/analyze/entropy", json=body).status_code == 202
    refused(api.post("/analyze/entropy", json=body | {"prompts": ["1?"]}), "/prompts", "either")
    wrong = {"vocab_size": 2, "texts": GIVEN["texts"]}
    place = "/logprobs/texts/0/content/0/top_logprobs"
    refused(api.post("/analyze/entropy", json=body | {"logprobs": wrong}), place, "not the likeliest")


def test_what_is_not_exact_is_nowhere_called_an_entropy(api, bounded):
    home = f"/analyze/entropy/{bounded.run_id}"
    assert api.get(home).json()["result"]["exact"] is False
    (sequence,) = api.get(f"{home}/sequences").json()["data"]
    assert sequence["exact"] is False
    assert set(sequence["stats"]) == {"h_mean_low", "h_mean_high"}
    tokens = api.get(f"{home}/sequences/0/tokens").json()
    assert (tokens["exact"], tokens["token_ids"], tokens["tokens"]) == (False, None, [" a", " b"])
    assert set(tokens["channels"]) == {"entropy_low", "entropy_high", "logp", "top_prob"}
    some = api.get(f"{home}/sequences/0/tokens", params={"channels": "entropy_high"}).json()["channels"]
    assert some == {"entropy_high": tokens["channels"]["entropy_high"]}
    low = tokens["channels"]["entropy_low"]
    found = [tokens["pivots"], *(api.get(f"{home}/cdps", params=q).json()["data"] for q in ({}, ANYTHING))]
    for pivots in found:
        assert pivots
        for pivot in pivots:
            assert pivot["entropy"] is None
            assert pivot["entropy_low"] == pytest.approx(low[pivot["position"]], rel=1e-6)
    for word in api.get(f"{home}/words").json()["data"]:
        assert (word["mean_entropy"], word["max_entropy"]) == (None, None)
        assert word["mean_entropy_low"] == word["max_entropy_low"] > 0
    assert api.get(f"{home}/histogram").json()["num_tokens"] == 0


def test_bounds_are_exported_and_nothing_branches_from_them(api, bounded):
    home = f"/analyze/entropy/{bounded.run_id}"
    arrays = np.load(io.BytesIO(api.get(f"{home}/export", params={"format": "npz"}).content))
    assert {"entropy_low", "entropy_high", "pivots"} <= set(arrays.files)
    assert not {"entropy", "token_ids"} & set(arrays.files)
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(io.BytesIO(api.get(f"{home}/export", params={"format": "parquet"}).content))
    assert table.column_names == [
        *("n", "position", "token", "is_pivot"),
        "entropy_low",
        "entropy_high",
        "logp",
        "top_prob",
    ]
    packed = api.get(f"{home}/export", params={"format": "html"}).text
    assert '"entropy_low"' in packed
    sequence = api.get(f"{home}/sequences").json()["data"][0]["id"]
    refused(api.post("/analyze/branch", json=MODEL | {"sequence": sequence, "position": 0}), "/sequence", "`texts`")
