"""Which models a job may name, how they are loaded, and what a prompt is."""

import json

import pytest

from erpo_core.errors import RunError, UnknownReferenceError
from erpo_core.job import JobInputs, ModelInput
from erpo_core.models import check_model_ref, load_model, load_policy, prepare_model
from erpo_core.prompts import prompt_ids, prompt_text, stop_token_ids, template_digest
from erpo_core.specs.common import PromptSpec, WorkedExample
from tiny_model import make_tiny_model, make_tiny_tokenizer


@pytest.mark.parametrize("ref", ["smollm2-135m", "Qwen/Qwen2.5-Math-7B", "org/name@0123abc"])
def test_registered_names_and_hub_ids_pass(ref):
    check_model_ref(ref)


@pytest.mark.parametrize("ref", ["smollm3", "", "org/", "a/b/c", "org/name@main; rm", "../x/y", "https://host/model"])
def test_other_names_are_refused_with_a_mend(ref, tmp_path):
    with pytest.raises(UnknownReferenceError) as caught:
        check_model_ref(ref, [tmp_path])
    assert caught.value.pointer == "/model"
    assert caught.value.mend


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UnknownReferenceError) as caught:
        check_model_ref("smollm3")
    assert "smollm2-135m" in caught.value.mend


def test_a_local_folder_must_lie_in_an_allowed_root_even_through_links(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "model", outside):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"")
    (root / "link").symlink_to(outside)
    check_model_ref(str(root / "model"), [root])
    for path in (outside, root / "link", root / "model" / ".." / ".." / "outside"):
        with pytest.raises(UnknownReferenceError) as caught:
            check_model_ref(str(path), [root])
        assert caught.value.code == "forbidden_path"
    with pytest.raises(UnknownReferenceError):
        check_model_ref(str(root / "model"), [])


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnknownReferenceError, match="safetensors"):
        check_model_ref(str(tmp_path), [tmp_path])


def test_a_hub_out_of_reach_is_a_clear_failure(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(RunError, match="org/name") as caught:
        prepare_model("org/name", cache_dir=tmp_path)
    assert caught.value.code == "model_unavailable"


def inputs(tmp_path, adapter=None) -> JobInputs:
    base = ModelInput(str(tmp_path / "model"), adapter)
    return JobInputs("job_1", "run_1", 1, tmp_path, tmp_path / "cache", base, model_roots=(tmp_path,))


def test_a_policy_carries_its_adapter_and_digests(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    make_tiny_model(tmp_path / "model")
    plain, _, before = load_policy(inputs(tmp_path), dtype=torch.float32)
    model, _ = load_model(tmp_path / "model", dtype=torch.float32)
    peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False)).save_pretrained(tmp_path / "adapter")
    adapted, tokenizer, after = load_policy(inputs(tmp_path, tmp_path / "adapter"), dtype=torch.float32)
    assert before["model_digest"] == after["model_digest"]
    assert before["adapter_digest"] is None
    assert len(after["adapter_digest"]) == 64
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    assert not torch.allclose(plain(ids).logits, adapted(ids).logits)


def test_the_attention_of_a_model_that_caps_its_scores_caps_them(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_logit_softcapping": 0.5}
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, initializer_range=0.5))
    model.save_pretrained(tmp_path)
    make_tiny_tokenizer().save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    loaded, _ = load_model(tmp_path, dtype=torch.float32)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(loaded(ids).logits, exact(ids).logits)
    assert not torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-3)


def test_a_pickled_adapter_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    make_tiny_model(tmp_path / "model")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    (adapter / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(RunError, match="safetensors"):
        load_policy(inputs(tmp_path, adapter), dtype=torch.float32)


def test_prompts_hold_worked_examples_as_turns():
    tokenizer = make_tiny_tokenizer()
    spec = PromptSpec(system_prompt="S", worked_examples=(WorkedExample(problem="p", solution="s"),))
    text = prompt_text(tokenizer, "q", spec)
    turns = [("system", "S"), ("user", "p"), ("assistant", "s"), ("user", "q")]
    assert text == "".join(f"<|im_start|>{who}\n{what}<|im_end|>\n" for who, what in turns) + "<|im_start|>assistant\n"
    ids = prompt_ids(tokenizer, "q", spec)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 5


def test_templates_differ_and_their_digest_tells():
    tokenizer = make_tiny_tokenizer()
    specs = [PromptSpec(), PromptSpec(template="qwen-boxed"), PromptSpec(template="raw"), PromptSpec(instruction="x")]
    assert len({template_digest(tokenizer, spec) for spec in specs}) == 4
    assert prompt_text(tokenizer, "q", specs[1]) == (  # Qwen2.5-Math's evaluation/utils.py, to the letter
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nq\n"
        "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt_text(tokenizer, "q", specs[2]) == "q\n"


def test_answers_end_at_the_end_of_turn_and_of_text(tmp_path):
    assert stop_token_ids(make_tiny_tokenizer(), make_tiny_model(tmp_path)) == [0, 2]
