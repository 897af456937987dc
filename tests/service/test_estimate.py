"""What a dry run promises, against what runs do and models have."""

import json
from pathlib import Path

import pytest

from erpo_core.memory import ModelSize, count_parameters, model_size, rows_of_micro_batch, training_memory
from erpo_core.specs import parse_spec
from service.estimate import estimate
from service.settings import Settings
from tiny_model import make_tiny_model

BODY = {"model": "m", "dataset": "d"}


class Counts:
    """A sink that counts the traces that it is sent."""

    traces = 0

    def emit(self, record) -> None:
        self.traces += record.kind == "trace"


def train_spec(**changes):
    return parse_spec("train", BODY | changes)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    pytest.importorskip("torch")
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def loaded(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2-135m", 134_515_008),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-7B-Instruct@0123abc", 7_615_616_512),
        ("Qwen/Qwen3-8B", 8e9),
        ("HuggingFaceTB/SmolLM2-360M", 360e6),
        ("org/name-2bit", None),
        ("org/name", None),
        ("/etc", None),
    ],
)
def test_a_models_size_is_known_by_its_name_or_not_at_all(name, parameters):
    size = model_size(name)
    assert (size and size.num_parameters) == parameters


@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "vocabulary", "tied"),
    [
        ("Qwen/Qwen2.5-1.5B", 12, 2, 151_936, True),
        ("Qwen/Qwen2.5-3B-Instruct", 16, 2, 151_936, True),
        ("Qwen/Qwen2.5-Math-7B", 28, 4, 152_064, False),
    ],
)
def test_a_known_shape_has_as_many_parameters_as_the_model(name, heads, kv_heads, vocabulary, tied):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, Qwen2Config

    size = model_size(name)
    config = Qwen2Config(
        hidden_size=size.shape.hidden_size,
        intermediate_size=size.shape.intermediate_size,
        num_hidden_layers=size.shape.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert size.num_parameters == sum(p.numel() for p in model.parameters())
    assert size.shape.kv_size == model.model.layers[0].self_attn.k_proj.out_features


EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("qwen*.json"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_dry_run_of_an_example_gives_numbers_for_all_that_it_names(api, database, tmp_path, path):
    root = Settings(data_dir=tmp_path, database_url=database.url).data_root
    row = {"problem": "p", "level": "Level 4", "type": "Algebra", "solution": "\\boxed{4}"}
    (root / "math_train.jsonl").write_text(f"{json.dumps(row)}\n" * 20)
    answer = api.post("/jobs/train", params={"dry_run": True}, json=json.loads(path.read_text()))
    found = answer.json()["estimate"]
    assert {"steps", "memory_bytes", "cpu_memory_bytes", "optimizer_bytes"} <= found.keys()
    assert [name for name, value in found.items() if value is None] == []


def test_a_folders_size_is_that_of_its_weights(tiny, loaded):
    size = model_size(str(tiny), [tiny.parent])
    assert size.num_parameters == count_parameters(tiny) == sum(p.numel() for p in loaded.parameters())
    cache = loaded(loaded.dummy_inputs["input_ids"][:1], use_cache=True).past_key_values
    assert len(cache.layers) == size.shape.num_layers
    assert cache.layers[0].keys[0, :, 0].numel() == size.shape.kv_size


def test_adapters_have_as_many_parameters_as_estimated(tiny, loaded):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(loaded, LoraConfig(r=8, target_modules="all-linear"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    estimated = training_memory(train_spec(lora={"r": 8}), model_size(str(tiny), [tiny.parent]))
    assert estimated["optimizer_bytes"] == 12 * trained


def test_training_every_weight_takes_a_reference_and_sixteen_bytes_a_parameter():
    seven = ModelSize(7_000_000_000)
    full = training_memory(train_spec(lora=None), seven)
    assert full["weights_bytes"] + full["optimizer_bytes"] == 20 * seven.num_parameters
    imitating = training_memory(train_spec(algorithm="sft", lora=None), seven)
    assert imitating["weights_bytes"] + imitating["optimizer_bytes"] == 16 * seven.num_parameters
    assert training_memory(train_spec(), seven)["weights_bytes"] == 2 * seven.num_parameters


def test_of_an_unknown_shape_nothing_is_said_that_depends_on_it():
    found = training_memory(train_spec(), ModelSize(7_000_000_000))
    unknown = {"optimizer_bytes", "kv_cache_bytes", "activation_bytes", "memory_bytes", "cpu_memory_bytes"}
    assert {name for name, value in found.items() if value is None} == unknown
    assert training_memory(train_spec(lora=None), ModelSize(7_000_000_000))["memory_bytes"] is None
    known = training_memory(train_spec(), model_size("smollm2-135m"))
    parts = unknown - {"memory_bytes", "cpu_memory_bytes"} | {"weights_bytes"}
    assert known["memory_bytes"] == sum(known[name] for name in parts)


def test_shards_divide_what_is_not_needed_whole():
    seven = ModelSize(7_000_000_000)
    four = {"hardware": {"num_gpus": 4, "strategy": "fsdp2"}}
    full = training_memory(train_spec(lora=None, **four), seven)
    assert full["weights_bytes"] == 4 * seven.num_parameters * (1 + 1 / 4)
    assert full["optimizer_bytes"] == 12 * seven.num_parameters / 4
    imitating = training_memory(train_spec(algorithm="sft", lora=None, **four), seven)
    assert imitating["weights_bytes"] + imitating["optimizer_bytes"] == 16 * seven.num_parameters / 4
    parted = training_memory(train_spec(lora=None, hardware={"num_gpus": 4, "strategy": "zero2"}), seven)
    assert parted["weights_bytes"] == 4 * seven.num_parameters * 2
    assert parted["optimizer_bytes"] == (12 + 4) * seven.num_parameters / 4


@pytest.mark.parametrize(
    "change",
    [{"gradient_checkpointing": True}, {"max_length": 512}, {"num_generations": 4}, {"load_in_4bit": True}],
)
def test_what_saves_memory_lowers_the_estimate(tiny, change):
    size = model_size(str(tiny), [tiny.parent])
    assert (
        training_memory(train_spec(**change), size)["memory_bytes"]
        < training_memory(train_spec(), size)["memory_bytes"]
    )


def test_the_papers_setting_on_5580_problems():
    found = estimate(train_spec(), 5580)
    assert (found["steps"], found["completions"]) == (2790, 44_640)
    assert found["completion_tokens"] == 44_640 * 2047
    assert found["traced_sequences"] == (279 + 1) * 8, "every tenth step, and the first"
    again = estimate(train_spec(dynamic_sampling=True, max_resample_rounds=2), 5580)
    assert (again["steps"], again["completions"]) == (2790, 3 * 44_640)
    assert estimate(train_spec(), None)["steps"] is None
    assert estimate(train_spec(algorithm="sft"), 5580)["steps"] == 349


@pytest.mark.parametrize("every", [1, 3, 10])
def test_traced_are_the_first_step_the_last_and_every_nth(every):
    for steps in range(1, 25):
        kept = [step for step in range(1, steps + 1) if step in (1, steps) or step % every == 0]
        found = estimate(train_spec(max_steps=steps, trace_every=every, max_completion_length=100), None)
        assert (found["traced_sequences"], found["trace_bytes"]) == (8 * len(kept), 8 * len(kept) * 100 * 20)


def test_the_traces_of_an_unknown_number_of_steps_are_unknown():
    found = estimate(train_spec(), None)
    assert (found["traced_sequences"], found["trace_bytes"]) == (None, None)
    assert estimate(train_spec(trace_every=0), None)["trace_bytes"] == 0


def test_evaluations_on_the_way_are_counted():
    changes = {"eval_every": 1000, "eval_benchmarks": ["amc23", "math500"], "eval_num_samples": 4, "eval_limit": 50}
    found = estimate(train_spec(**changes), 5580, num_eval_problems=[40, 500])
    assert found["eval_completions"] == 4 * (40 + 50) * 4, "before the first step, after 1000, 2000 and 2790"
    assert found["eval_completion_tokens"] == 1440 * 2047
    short = train_spec(**changes, eval_sampling={"max_completion_length": 100}, algorithm="sft", max_steps=1000)
    assert estimate(short, None, num_eval_problems=[40, 500])["eval_completion_tokens"] == 2 * 90 * 4 * 100
    unknown = train_spec(**changes | {"eval_limit": None})
    assert estimate(unknown, 5580, num_eval_problems=[40, None])["eval_completions"] is None
    assert "eval_completions" not in estimate(train_spec(), 5580)


@pytest.mark.parametrize("algorithm", ["erpo", "sft"])
def test_a_run_takes_the_steps_that_were_estimated(tiny, tmp_path, algorithm):
    from erpo_core.job import JobInputs, ModelInput
    from workers.child.stop import StopFlag
    from workers.child.train import run

    rows = [{"problem": f"{a} + 1?", "answer": a + 1, "solution": f"{a + 1}"} for a in range(5)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = {"train_batch_size": 2} if algorithm == "sft" else {"num_generations": 2, "generation_batch_size": 4}
    if algorithm == "erpo":
        sizes |= {"max_completion_length": 4, "num_iterations": 2, "preflight": False}
    spec = train_spec(model=str(tiny), dataset="data:sums.jsonl", algorithm=algorithm, num_train_epochs=2, **sizes)
    inputs = JobInputs("job", "run", 1, tmp_path, tmp_path, ModelInput(str(tiny)), tmp_path, (tiny.parent,))
    found, sink = estimate(spec, 5), Counts()
    assert run(spec, inputs, sink, StopFlag())["steps"] == found["steps"]
    assert sink.traces == found.get("traced_sequences", 0)


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"generation_batch_size": 32, "max_completion_length": 64}, 32),
        ({"generation_batch_size": 64, "max_completion_length": 300}, 16),
        ({"generation_batch_size": 64, "max_completion_length": 1500}, 8),
        ({"generation_batch_size": 32, "max_completion_length": 64, "hardware": {"num_gpus": 4, "strategy": "ddp"}}, 8),
        ({"generation_batch_size": 8, "hardware": {"num_gpus": 2, "strategy": "ddp"}}, 4),
    ],
)
def test_short_answers_share_a_micro_batch(changes, rows):
    assert rows_of_micro_batch(train_spec(num_generations=8, **changes), on_cuda=True) == rows


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        pytest.param({}, 16, id="the paper's setting: one micro-batch"),
        pytest.param({"generation_batch_size": 512, "max_completion_length": 128}, 512, id="short answers"),
        pytest.param({"generation_batch_size": 512, "max_length": 4096, "max_completion_length": 3000}, 16, id="long"),
        pytest.param({"generation_batch_size": 24, "max_length": 3000}, 8, id="whole groups that divide the share"),
        pytest.param({"num_generations": 64, "generation_batch_size": 64, "max_length": 4096}, 16, id="cut groups"),
        pytest.param({"max_length": 131_072}, 1, id="one answer that is longer than the bound"),
        pytest.param({"generation_batch_size": 64, "hardware": {"num_gpus": 4, "strategy": "ddp"}}, 16, id="ranks"),
        pytest.param({"algorithm": "sft"}, 16, id="solutions"),
        pytest.param({"algorithm": "sft", "train_batch_size": 512}, 32, id="many solutions"),
    ],
)
def test_on_a_cpu_a_micro_batch_is_the_share_as_far_as_its_tokens_are_bounded(changes, rows):
    assert rows_of_micro_batch(train_spec(**changes), on_cuda=False) == rows


def test_on_a_cpu_memory_grows_with_the_micro_batch_and_no_further(tiny):
    size = model_size(str(tiny), [tiny.parent])
    found = [
        training_memory(train_spec(generation_batch_size=answers, max_length=4096), size) for answers in (8, 16, 512)
    ]
    activations = [one["cpu_memory_bytes"] - one["kv_cache_bytes"] for one in found]
    assert found[0]["cpu_memory_bytes"] >= found[0]["memory_bytes"]
    assert activations[0] < activations[1] == activations[2]
    assert training_memory(train_spec(load_in_4bit=True), size)["cpu_memory_bytes"] is None
