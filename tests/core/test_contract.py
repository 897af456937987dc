"""The light contracts: job specifications, records, errors, and what an import may pull in."""

import pickle
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from erpo_core import errors, records
from erpo_core.job import JobInputs, ModelInput
from erpo_core.specs import SPECS, parse_spec

TRAIN = {"model": "m", "dataset": "d"}


@pytest.mark.parametrize("module", ["erpo_core", "erpo_core.specs", "erpo_core.records", "erpo_core.codec"])
def test_light_modules_do_not_import_torch(module):
    heavy = "{'torch', 'transformers', 'trl', 'vllm', 'peft', 'celery', 'fastapi'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_request_with_only_model_and_dataset_is_the_papers_setting():
    spec = parse_spec("train", TRAIN)
    assert spec.algorithm == "erpo"
    assert (spec.num_generations, spec.generation_batch_size) == (8, 16)
    assert (spec.learning_rate, spec.weight_decay, spec.warmup_steps) == (5e-6, 0.001, 0.1)
    assert (spec.lora.r, spec.lora.lora_alpha) == (32, 64)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_generations": 1}, "num_generations"),
        ({"generation_batch_size": 12}, "generation_batch_size"),
        ({"temperature": -1}, "temperature"),
        ({"learning_rat": 1e-5}, "learning_rat"),
        ({"algorithm": "grpo", "num_buckets": 3}, "num_buckets"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"outcome_reward": "regex"}, "outcome_reward"),
        ({"max_completion_length": 4096}, "max_completion_length"),
    ],
)
def test_a_wrong_training_field_is_named(change, field):
    with pytest.raises(ValidationError) as caught:
        parse_spec("train", TRAIN | change)
    assert field in str(caught.value)


def test_without_accuracy_the_first_reward_decides_right_and_wrong():
    for rewards, outcome in ((["mine", "boxed_format"], "mine"), (["mine", "accuracy"], "accuracy")):
        spec = parse_spec("train", TRAIN | {"rewards": [{"name": name} for name in rewards]})
        assert spec.outcome_reward == outcome
        assert parse_spec("train", spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize(
    "modules",
    [
        "all-linear",
        ["q_proj", "layers.0.mlp.up_proj"],
        r".*\.(q_proj|v_proj)",
        r"model\.layers\.\d{1,2}\.self_attn\.[qv]_proj",
        r"(?!lm_head).*_proj",
    ],
)
def test_modules_are_named_as_peft_reads_them(modules):
    lora = parse_spec("train", TRAIN | {"lora": {"target_modules": modules}}).lora
    assert lora.target_modules == (modules if isinstance(modules, str) else tuple(modules))


@pytest.mark.parametrize("expression", ["(" * 20 + "." + "*)" * 20 + "x", "(?:(?:()){60000}){60000}x", "(?:.?){500}x"])
def test_an_expression_that_would_be_tried_for_ever_is_read_at_once(expression):
    started = time.monotonic()
    parse_spec("train", TRAIN | {"lora": {"target_modules": expression}})
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("kind", SPECS)
def test_every_whole_number_of_a_request_has_a_bound(kind):
    def unbounded(schema, path: str = ""):
        if isinstance(schema, dict):
            if schema.get("type") == "integer" and not {"maximum", "exclusiveMaximum", "const"} & schema.keys():
                yield path
            for name, value in schema.items():
                yield from unbounded(value, f"{path}/{name}")
        elif isinstance(schema, list):
            for index, value in enumerate(schema):
                yield from unbounded(value, f"{path}/{index}")

    rewards = {path for path in unbounded(SPECS[kind].json_schema()) if path.startswith("/$defs/RewardSpec")}
    assert set(unbounded(SPECS[kind].json_schema())) == rewards, "a reward checks its own arguments"


def test_a_stored_spec_reads_back_as_itself():
    spec = parse_spec("train", TRAIN | {"algorithm": "grpo", "lora": None})
    assert parse_spec("train", spec.model_dump(mode="json")) == spec


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1), st.floats() | st.none()), st.binary(max_size=200))
def test_records_survive_the_wire_and_numbers_that_are_not_finite_become_null(values, payload):
    for record in (records.Metrics(3, values), records.Trace(1, {"stats": values}, payload)):
        frame = records.encode_frame(*records.to_wire(record))
        position = 0

        def read_exactly(count, frame=frame):
            nonlocal position
            position += count
            return frame[position - count : position]

        back = records.from_wire(*records.read_frame(read_exactly))
        finite = {k: v if v is not None and v - v == 0 else None for k, v in values.items()}
        assert type(back) is type(record)
        assert (back.values if isinstance(back, records.Metrics) else back.meta["stats"]) == finite
        assert getattr(back, "payload", payload) == payload


def test_a_frame_beyond_the_bounds_is_refused():
    with pytest.raises(ValueError, match="beyond"):
        records.read_frame(lambda count: b"\xff" * count)


@pytest.mark.parametrize("cls", [c for c in vars(errors).values() if isinstance(c, type)])
def test_errors_are_picklable_and_keep_their_fields(cls):
    error = cls("told", code="other")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is cls
    assert vars(back) == vars(error)
    assert str(back) == "told"


def test_job_inputs_travel_as_json(tmp_path):
    inputs = JobInputs(
        job_id="job_1",
        run_id="run_1",
        attempt=2,
        work_dir=tmp_path,
        cache_dir=tmp_path / "cache",
        model=ModelInput("smollm2-135m", tmp_path / "adapter"),
        stored_rows=({"prompt_id": "p", "sample": 0}, {"prompt_id": "p", "sample": 1}),
        stored_traces=({"prompt_id": "p", "sample": 0, "blob": "RVJQVA==", "pivots": []},),
    )
    assert inputs.stored == {("p", 0), ("p", 1)}
    assert JobInputs.from_json(inputs.to_json()) == inputs
