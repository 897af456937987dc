"""An evaluation of a tiny model: its records, its numbers, and the same numbers after an interruption."""

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("math_verify")

from erpo_core.errors import RunError  # noqa: E402
from erpo_core.evaluation import run_evaluation  # noqa: E402
from erpo_core.evaluation_summary import summarise  # noqa: E402
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


def test_an_adapter_is_evaluated(home, tmp_path):
    peft = pytest.importorskip("peft")
    from erpo_core.models import load_model

    model, _ = load_model(home / "models" / "tiny", dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    base, memory = Memory(), Memory()
    run_evaluation(spec(home), inputs(home), base, base)
    adapted = JobInputs.from_json(
        {
            **inputs(home).to_json(),
            "model": {"base": str(home / "models" / "tiny"), "adapter_path": str(tmp_path / "adapter")},
        }
    )
    run_evaluation(spec(home), adapted, memory, memory)
    assert memory.of(Resolved)[0].data["adapter_digest"]
    assert [row["completion"] for row in memory.rows] != [row["completion"] for row in base.rows]


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
