"""A perturbation and a tree of branches of a tiny model, end to end, against what their records say."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import AutoTokenizer  # noqa: E402

from erpo_core.analysis.branch import run_branch  # noqa: E402
from erpo_core.analysis.perturbation import run_perturbation  # noqa: E402
from erpo_core.analysis.perturbation_summary import summarise  # noqa: E402
from erpo_core.errors import RunError, SpecError  # noqa: E402
from erpo_core.job import JobInputs, ModelInput  # noqa: E402
from erpo_core.records import Completions, Result, Trace, from_wire, to_wire  # noqa: E402
from erpo_core.specs.branch import BranchSpec  # noqa: E402
from erpo_core.specs.perturbation import ATTEMPTS_STEP, OUTCOMES_STEP, PerturbationSpec  # noqa: E402
from tiny_model import make_tiny_model, teach  # noqa: E402

RUNNING = SimpleNamespace(requested=False)
ANSWER = "We add. It is \\boxed{2}."


class Memory:
    """A sink that keeps what would go over the wire."""

    def __init__(self) -> None:
        self.records = []

    def emit(self, record) -> None:
        self.records.append(from_wire(*to_wire(record)))

    def of(self, kind) -> list:
        return [record for record in self.records if isinstance(record, kind)]

    @property
    def rows(self) -> list[dict]:
        return [row for record in self.of(Completions) for row in record.rows if record.step == OUTCOMES_STEP]

    @property
    def attempts(self) -> list[dict]:
        return [row for record in self.of(Completions) for row in record.rows if record.step == ATTEMPTS_STEP]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A tiny model that has learnt one answer by heart, so that it solves its problems."""
    path = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", hidden_size=64)
    teach(path, "1 + 1?", ANSWER)
    (path.parent / "sums.jsonl").write_text(
        '{"id": "easy", "problem": "1 + 1?", "answer": "2"}\n{"id": "hard", "problem": "1 + 1? ", "answer": "3"}\n'
    )
    return path


def inputs(path, **changes) -> JobInputs:
    folder = path.parent
    values = {"job_id": "job_1", "run_id": "run_1", "attempt": 1, "work_dir": folder / "w", "cache_dir": folder / "c"}
    values |= {"model": ModelInput(str(path)), "model_roots": (folder,), "data_root": folder}
    return JobInputs(**values | changes)


def perturb(path, stored=(), stop=RUNNING, **changes) -> tuple[Memory, dict]:
    body = {"model": str(path), "dataset": "data:sums.jsonl", "num_attempts": 2, "num_continuations": 3}
    body |= {"sampling": {"max_completion_length": 30, "temperature": 0.3}, "batch_size": 8, "policy": "uniform_vocab"}
    sink = Memory()
    spec = PerturbationSpec.model_validate(body | {"fraction": 0.15} | changes)
    return sink, run_perturbation(spec, inputs(path, stored_rows=tuple(stored)), sink, stop)


def test_every_arm_disturbs_the_same_answers_before_the_box(taught):
    sink, result = perturb(taught)
    assert (result["num_tried"], result["num_solved"], result["num_problems"]) == (2, 1, 1)
    assert result["num_outcomes"] == len(sink.rows) == 5 * 3
    (trace,) = sink.of(Trace)
    assert trace.meta["completion"] == ANSWER
    assert trace.meta["gold"] == "2"
    assert [(row["prompt_id"], row["sample"], row["reward"]) for row in sink.attempts] == [
        *(("0", 0, 1.0), ("0", 1, 1.0), ("1", 0, 0.0), ("1", 1, 0.0))
    ]
    for row in sink.rows:
        group, arm, place, edit = row["prompt_id"].split("/")
        written, replacing = map(int, edit.split(">"))
        assert group == "0"
        assert int(place) < ANSWER.index("\\boxed")
        assert (written == replacing) == (arm == "same")
        assert row["completion"].startswith(ANSWER[: int(place)])
        assert (row["completion"][int(place)] == ANSWER[int(place)]) == (arm == "same")
        assert row["reward"] == float(row["verdict"] == "right" and not row["truncated"])


def test_accuracies_are_those_of_the_rows(taught):
    sink, result = perturb(taught)
    for arm, numbers in result["arms"].items():
        rewards = [row["reward"] for row in sink.rows if row["prompt_id"].split("/")[1] == arm]
        assert numbers["accuracy"]["value"] == pytest.approx(np.mean(rewards))
        assert numbers["num_outcomes"] == len(rewards) == 3
    assert result["arms"]["high"]["mean_entropy"] > result["arms"]["low"]["mean_entropy"]
    assert sink.of(Result)[0].data == json.loads(json.dumps(result))


def test_the_same_request_gives_the_same_outcomes_and_stored_ones_are_not_sampled_again(taught):
    first, expected = perturb(taught)
    kept = [{k: row[k] for k in ("prompt_id", "sample", "verdict", "truncated")} for row in first.rows[:7]]
    second, found = perturb(taught, stored=kept)
    assert found == expected
    assert [(r["prompt_id"], r["sample"]) for r in second.rows] == [
        (r["prompt_id"], r["sample"]) for r in first.rows[7:]
    ]
    assert [r["completion"] for r in second.rows] == [r["completion"] for r in first.rows[7:]]
    assert perturb(taught, stop=SimpleNamespace(requested=True))[1] == {"stopped": True}


@pytest.mark.parametrize("policy", ["on_policy_alt", "second_best", "surprisal_matched", "truncate"])
def test_every_policy_puts_what_it_says(taught, policy):
    sink, result = perturb(taught, policy=policy, arms=["high", "low"], num_positions=2)
    edits = [row["prompt_id"].split("/")[3].split(">") for row in sink.rows]
    assert all((new == "") == (policy == "truncate") and new != old for old, new in edits)
    assert [c["test"] for c in result["contrasts"]] == ["sign_flip"]


def test_one_outcome_per_problem_is_tested_by_mcnemar(taught):
    _, result = perturb(taught, num_continuations=1, arms=["high", "low"])
    (contrast,) = result["contrasts"]
    assert contrast["test"] == "mcnemar_exact"
    assert sum(map(sum, contrast["table"])) == result["num_problems"]
    assert contrast["minimum_detectable"] is None


def test_all_edits_at_once_leave_the_rest_of_the_text_and_ask_for_the_answer_again(taught):
    sink, _ = perturb(taught, mode="edit_all", arms=["high", "same"])
    before = ANSWER[: ANSWER.index("\\boxed")]
    for row in sink.rows:
        differing = [a != b for a, b in zip(before, row["completion"], strict=False)]
        assert sum(differing) == (3 if "/high/" in row["prompt_id"] else 0)


def test_a_cut_continuation_is_wrong_and_is_shown():
    rows = [
        {"prompt_id": f"{g}/{arm}/1/5>6", "sample": 0, "verdict": "right", "truncated": arm == "high" and g < 5}
        for g in range(10)
        for arm in ("high", "low")
    ]
    spec = PerturbationSpec.model_validate({"model": "m", "dataset": "d", "arms": ["high", "low"]})
    result = summarise(rows, [], spec)
    assert result["arms"]["high"]["accuracy"]["value"] == result["arms"]["high"]["truncated"] == 0.5
    (contrast,) = result["contrasts"]
    assert (contrast["difference"], contrast["table"]) == (0.5, [[5, 5], [0, 0]])
    assert contrast["p_value"] == contrast["p_holm"] == 0.0625


def test_a_data_set_that_is_not_solved_says_so(taught):
    (taught.parent / "hard.jsonl").write_text('{"problem": "1 + 1?", "answer": "3"}\n')
    with pytest.raises(RunError, match="0 were solved") as refused:
        perturb(taught, dataset="data:hard.jsonl")
    assert refused.value.code == "nothing_solved"


def branch(path, *, source=None, stored=(), **changes) -> tuple[Memory, dict]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    stored_sequence = {"prompt": "1 + 1?", "prompt_spec": {}, "token_ids": ids, "gold": "2", "tokenizer_digest": None}
    body = {"model": str(path), "sequence": "seq_" + "0" * 32, "position": 4, "num_continuations": 4}
    body |= {"sampling": {"max_completion_length": 30, "temperature": 0.3}, "num_alternatives": 3, "batch_size": 8}
    sink = Memory()
    given = inputs(path, source=stored_sequence | (source or {}), stored_rows=tuple(stored))
    return sink, run_branch(BranchSpec.model_validate(body | changes), given, sink, RUNNING)


def test_branches_are_the_likeliest_tokens_and_their_rates_those_of_the_rows(taught):
    sink, result = branch(taught)
    assert result["prefix"] == ANSWER[:4]
    logps = [b["logp"] for b in result["branches"]]
    assert logps == sorted(logps, reverse=True)
    assert [b["is_written"] for b in result["branches"]] == [True, False, False]
    assert result["branches"][0]["right"] == 4
    for one in result["branches"]:
        rows = [row for row in sink.rows if row["prompt_id"] == f"4/{one['token_id']}"]
        assert one["num"] == len(rows)
        assert one["right"] == sum(row["reward"] for row in rows)
        assert one["rate"]["low"] <= one["rate"]["value"] <= one["rate"]["high"]
        assert all(row["completion"].startswith(ANSWER[:4] + one["token"].rstrip("\ufffd")) for row in rows)
        assert sum(a["count"] for a in one["answers"]) == one["num"]


def test_the_written_token_is_a_branch_however_unlikely(taught):
    tokenizer = AutoTokenizer.from_pretrained(taught)
    ids = tokenizer("We zzz", add_special_tokens=False)["input_ids"]
    _, result = branch(taught, source={"token_ids": ids}, num_alternatives=1)
    assert [b["is_written"] for b in result["branches"]] == [False, True]


def test_without_a_right_answer_nothing_is_judged(taught):
    sink, result = branch(taught, source={"gold": None})
    assert {row["reward"] for row in sink.rows} == {row["verdict"] for row in sink.rows} == {None}
    assert all(b["rate"] is None for b in result["branches"])
    assert branch(taught, source={"gold": None}, gold="2")[1]["branches"][0]["right"] == 4


def test_stored_branches_are_not_sampled_again(taught):
    first, expected = branch(taught)
    kept = [row for row in first.rows if row["prompt_id"] == first.rows[0]["prompt_id"]]
    second, found = branch(taught, stored=kept)
    assert found == expected
    assert len(second.rows) == len(first.rows) - len(kept)


def test_another_tokenizer_is_refused(taught):
    with pytest.raises(SpecError, match="tokenizer") as refused:
        branch(taught, source={"tokenizer_digest": "other"})
    assert refused.value.pointer == "/model"
