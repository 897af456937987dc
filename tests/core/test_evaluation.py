"""An evaluation of a tiny model: its records, its numbers, and the same numbers after an interruption."""

import json
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("math_verify")

from erpo_core import evaluation_again, evaluation_answers  # noqa: E402
from erpo_core.errors import RunError  # noqa: E402
from erpo_core.evaluation import run_evaluation  # noqa: E402
from erpo_core.evaluation_summary import summarise  # noqa: E402
from erpo_core.generation import policy  # noqa: E402
from erpo_core.job import JobInputs, ModelInput  # noqa: E402
from erpo_core.records import Completions, Progress, Resolved, Result, from_wire, to_wire  # noqa: E402
from erpo_core.specs.evaluate import EvaluateSpec  # noqa: E402
from tiny_model import make_tiny_model  # noqa: E402


class Memory:
    """A sink, and a stop that is raised after so many batches."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.records, self.stop_after = [], stop_after

    def emit(self, record) -> None:
        self.records.append(from_wire(*to_wire(record)))

    def of(self, kind) -> list:
        return [record for record in self.records if isinstance(record, kind)]

    @property
    def rows(self) -> list[dict]:
        return [row for record in self.of(Completions) for row in record.rows]

    @property
    def requested(self) -> bool:
        return self.stop_after is not None and len(self.of(Completions)) >= self.stop_after


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("evaluation")
    make_tiny_model(home / "models" / "tiny")
    lines = [{"problem": f"What is {i} + {i * i}?", "answer": str(i + i * i)} for i in range(5)]
    (home / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home


def inputs(home, **more) -> JobInputs:
    return JobInputs(
        job_id="job_1",
        run_id="run_1",
        attempt=1,
        work_dir=home / "work",
        cache_dir=home / "cache",
        model=ModelInput(str(home / "models" / "tiny")),
        data_root=home,
        model_roots=(home / "models",),
        **more,
    )


def spec(home, **more) -> EvaluateSpec:
    sampling = {"max_completion_length": 6, "seed": 5}
    body = {"model": str(home / "models" / "tiny"), "dataset": "data:sums.jsonl", "num_samples": 3, "batch_size": 7}
    return EvaluateSpec.model_validate({**body, "sampling": sampling, **more})


def test_every_answer_is_recorded_once_and_counted(home):
    memory = Memory()
    result = run_evaluation(spec(home), inputs(home), memory, memory)
    assert [type(record) for record in memory.records[:3]] == [Progress, Resolved, Completions]
    assert {(row["prompt_id"], row["sample"]) for row in memory.rows} == {
        (f"sums/{line}", sample) for line in range(1, 6) for sample in range(3)
    }
    assert len(memory.rows) == 15
    assert all(len(record.rows) <= 7 for record in memory.of(Completions))
    assert memory.of(Result)[0].data == json.loads(json.dumps(result))
    assert (result["num_problems"], result["num_samples"], result["num_answers"]) == (5, 3, 15)
    assert sum(result["verdicts"].values()) == pytest.approx(1)
    assert sorted(result["pass_at"]) == ["1", "2"]
    last = memory.of(Progress)[-1]
    assert (last.phase, last.done, last.total) == ("generate", 15, 15)
    resolved = memory.of(Resolved)[0].data
    for name in ("model_digest", "tokenizer_digest", "dataset_digest", "template_digest"):
        assert len(resolved[name]) == 64
    assert resolved["adapter_digest"] is None


def test_progress_is_told_while_answers_grow(home, monkeypatch):
    monkeypatch.setattr(evaluation_answers, "_TELL_SECONDS", -1)
    memory = Memory()
    run_evaluation(spec(home), inputs(home), memory, memory)
    stored = next(index for index, record in enumerate(memory.records) if isinstance(record, Completions))
    early = [record for record in memory.records[:stored] if isinstance(record, Progress) and record.data]
    assert 6 in [record.done for record in early]
    assert {record.data["acc"] for record in early} == {None}
    assert early[0].data["tokens_per_second"] > 0
    told = [record.done for record in memory.of(Progress) if record.phase == "generate"]
    assert told == sorted(told)
    assert told[-1] == 15
    assert len(told) > 10


@pytest.mark.parametrize("lost", [0, 2])
def test_an_interrupted_evaluation_ends_with_the_same_answers(home, lost):
    whole, body = Memory(), spec(home, batch_size=3)
    expected = run_evaluation(body, inputs(home), whole, whole)
    first = Memory(stop_after=2)
    assert run_evaluation(body, inputs(home), first, first) == {"stopped": True}
    assert first.of(Result) == []
    kept = first.rows[: len(first.rows) - lost]
    names = ("prompt_id", "sample", "completion", "verdict", "boxed", "truncated", "num_tokens")
    stored = tuple({name: row[name] for name in names} for row in kept)
    second = Memory()
    assert run_evaluation(body, inputs(home, stored_rows=stored), second, second) == expected
    assert in_order([*kept, *second.rows]) == in_order(whole.rows)


def in_order(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: (row["prompt_id"], row["sample"]))


def test_more_samples_than_a_batch_holds_are_split(home):
    memory = Memory()
    run_evaluation(spec(home, num_samples=5, batch_size=2, limit=2), inputs(home), memory, memory)
    assert [len(record.rows) for record in memory.of(Completions)] == [2, 2, 1] * 2
    assert len({row["completion"] for row in memory.rows}) > 2


@pytest.fixture(scope="module")
def adapters(home, tmp_path_factory):
    """Two adapters of random weights."""
    peft = pytest.importorskip("peft")
    from erpo_core.models import load_model

    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model, _ = load_model(home / "models" / "tiny", dtype=torch.float32)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        folders.append(tmp_path_factory.mktemp("adapter"))
        model.save_pretrained(folders[-1])
    return folders


def run_of(home, name: str, folder, stored_rows=()) -> JobInputs:
    """What a run of a job is given for an adapter."""
    model = ModelInput(str(home / "models" / "tiny"), folder)
    return replace(inputs(home), run_id=name, model=model, stored_rows=tuple(stored_rows))


def by_run(memory: Memory) -> dict[str, dict]:
    """Resolved, rows and result of each run."""
    found = {record.run_id: {"resolved": record.data, "rows": []} for record in memory.of(Resolved)}
    for record in memory.of(Completions):
        found[record.run_id]["rows"] += record.rows
    for record in memory.of(Result):
        found[record.run_id]["result"] = record.data
    return found


def test_an_adapter_is_evaluated(home, adapters):
    base, memory = Memory(), Memory()
    run_evaluation(spec(home), inputs(home), base, base)
    run_evaluation(spec(home), run_of(home, "run_1", adapters[0]), memory, memory)
    assert memory.of(Resolved)[0].data["adapter_digest"]
    assert [row["completion"] for row in memory.rows] != [row["completion"] for row in base.rows]


@pytest.mark.parametrize("bf16", [False, True])
def test_several_adapters_on_one_base_answer_as_each_alone(home, adapters, bf16, monkeypatch):
    alone = {}
    for name, folder in (("run_a", adapters[0]), ("run_b", adapters[1]), ("run_base", None)):
        memory = Memory()
        run_evaluation(spec(home, bf16=bf16), run_of(home, name, folder), memory, memory)
        alone |= by_run(memory)
    loaded = []
    load = policy.load_model
    monkeypatch.setattr(policy, "load_model", lambda *args, **more: loaded.append(1) or load(*args, **more))
    first, *others = [
        run_of(home, *pair) for pair in (("run_a", adapters[0]), ("run_b", adapters[1]), ("run_base", None))
    ]
    memory = Memory()
    run_evaluation(spec(home, bf16=bf16), replace(first, also=tuple(others)), memory, memory)
    assert by_run(memory) == alone
    assert len(loaded) == 1
    assert len({one["resolved"]["identity"]["digest"] for one in alone.values()}) == 3
    assert len({str(one["rows"]) for one in alone.values()}) == 3
    assert [(record.done, record.total) for record in memory.of(Progress)[1:]][-1] == (45, 45)
    assert {record.data["run_id"] for record in memory.of(Progress)[1:]} == set(alone)


def test_a_job_of_several_runs_goes_on_where_it_was_stopped(home, adapters):
    runs = [run_of(home, "run_a", adapters[0]), run_of(home, "run_b", adapters[1])]
    whole, first, second = Memory(), Memory(stop_after=4), Memory()
    body = spec(home, batch_size=6)  # three batches a run
    run_evaluation(body, replace(runs[0], also=(runs[1],)), whole, whole)
    assert run_evaluation(body, replace(runs[0], also=(runs[1],)), first, first) == {"stopped": True}
    found = by_run(first)
    assert [len(found[name]["rows"]) for name in ("run_a", "run_b")] == [15, 6]
    assert ["result" in found[name] for name in ("run_a", "run_b")] == [True, False]
    again = [replace(run, stored_rows=tuple(found[run.run_id]["rows"])) for run in runs]
    run_evaluation(body, replace(again[0], also=(again[1],)), second, second)
    rest = by_run(second)
    assert [len(rest[name]["rows"]) for name in ("run_a", "run_b")] == [0, 9]
    for name, one in by_run(whole).items():
        assert in_order(found[name]["rows"] + rest[name]["rows"]) == in_order(one["rows"])
        assert rest[name]["result"] == one["result"]


def test_a_job_whose_answers_are_all_stored_loads_no_model(home, adapters, monkeypatch):
    whole, again = Memory(), Memory()
    expected = run_evaluation(spec(home), run_of(home, "run_a", adapters[0]), whole, whole)
    monkeypatch.delattr(policy, "load_model")
    assert run_evaluation(spec(home), run_of(home, "run_a", adapters[0], whole.rows), again, again) == expected
    assert again.rows == []


def test_models_of_different_weights_are_loaded_one_after_the_other(home, tmp_path):
    make_tiny_model(tmp_path / "other", seed=1)
    memory = Memory()
    other = replace(inputs(home), run_id="run_2", model=ModelInput(str(tmp_path / "other")), model_roots=(tmp_path,))
    run_evaluation(spec(home), replace(inputs(home), also=(other,)), memory, memory)
    found = by_run(memory)
    assert found["run_1"]["resolved"]["model_digest"] != found["run_2"]["resolved"]["model_digest"]
    assert [len(one["rows"]) for one in found.values()] == [15, 15]


def test_stored_answers_are_judged_again_and_nothing_else_changes(home, monkeypatch):
    first, part, second = Memory(), Memory(), Memory()
    expected = run_evaluation(spec(home), inputs(home), first, first)
    stale = [row | {"verdict": "crashed", "reward": 0.0} for row in first.rows]
    body = spec(home, answers_of="run_" + "0" * 32)
    source = {"resolved": first.of(Resolved)[0].data, "answers": stale}
    monkeypatch.delattr(policy, "load_model")
    monkeypatch.setattr(evaluation_again, "_TOGETHER", 4)
    part.stop_after = 2
    assert run_evaluation(body, inputs(home, source=source), part, part) == {"stopped": True}
    again = inputs(home, source=source, stored_rows=tuple(part.rows))
    assert run_evaluation(body, again, second, second) == expected
    assert in_order(part.rows + second.rows) == in_order(first.rows)
    assert [len(record.rows) for record in second.of(Completions)] == [4, 3]
    assert second.of(Resolved)[0].data["identity"] == first.of(Resolved)[0].data["identity"]


def test_a_prompt_without_room_for_an_answer_fails_with_its_name(home):
    memory = Memory()
    body = spec(home, sampling={"max_completion_length": 4096})
    with pytest.raises(RunError, match="sums/") as caught:
        run_evaluation(body, inputs(home), memory, memory)
    assert caught.value.code == "prompt_too_long"


def row(problem, sample, verdict, content="1", truncated=False, num_tokens=10):
    return {
        "prompt_id": problem,
        "sample": sample,
        "completion": f"\\boxed{{{content}}}",
        "verdict": verdict,
        "boxed": verdict != "unparsable",
        "truncated": truncated,
        "num_tokens": num_tokens,
    }


def test_the_summary_counts_what_it_says(home):
    rows = [
        *[row("a", i, "right", content) for i, content in enumerate(["7", "7.0", "14/2", "7"])],
        row("b", 0, "right", "3", truncated=True),
        *[row("b", i, "wrong", "4", num_tokens=20) for i in (1, 2)],
        row("b", 3, "unparsable", ""),
    ]
    credit = summarise(rows, spec(home, num_samples=4, pass_at=[1, 2, 4]))
    assert credit["acc"]["value"] == 5 / 8
    assert credit["acc"]["low"] == 0.25
    assert credit["acc"]["high"] == 1
    assert credit["fmt"]["value"] == 7 / 8
    assert credit["truncated"] == 1 / 8
    assert credit["mean_length"]["value"] == 12.5
    assert {k: v["value"] for k, v in credit["pass_at"].items()} == {"1": 5 / 8, "2": 0.75, "4": 1.0}
    assert credit["maj_at"]["4"]["value"] == 0.5
    assert credit["verdicts"] == {"right": 5 / 8, "unparsable": 1 / 8, "wrong": 2 / 8}
    strict = summarise(rows, spec(home, num_samples=4, truncated_boxed="wrong"))
    assert strict["acc"]["value"] == 4 / 8
    assert strict["verdicts"] == credit["verdicts"]
    assert summarise([*rows, *rows], spec(home)) == summarise(rows, spec(home))
