"""What a GPU does otherwise than a CPU: recorded decoding, products in bfloat16, other attention kernels."""

import copy
from itertools import chain

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_trainer import gradient, rollouts, train
from test_trainer_runs import make_trainer, metrics_of

from erpo_core import packing
from erpo_core.generation import fixed
from erpo_core.generation.base import Sample
from erpo_core.generation.transformers import TransformersEngine
from erpo_core.logits import score_tokens, top_alternatives
from erpo_core.models import load_model
from erpo_core.trainer.scoring import pad_rollouts, reference_states, score_rollouts
from tiny_model import make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

PROMPTS = [[5, 6, 7, 8], [9], list(range(20, 60))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", hidden_size=64)


@pytest.fixture
def policy(tiny):
    torch.manual_seed(0)
    model, tokenizer = load_model(tiny, dtype=torch.float32, device="cuda")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config).eval(), tokenizer


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}])
def test_a_recorded_token_is_the_token(policy, sampling):
    call = {"n": 5, "max_new_tokens": 500, "stop_ids": [2, 50], "seed": 3, **sampling}
    recorded = TransformersEngine(*policy).generate(PROMPTS, **call)
    growing = TransformersEngine(*policy, fixed_shapes=False).generate(PROMPTS, **call)
    assert recorded == TransformersEngine(*policy).generate(PROMPTS, **call)
    pairs = list(zip(chain(*recorded), chain(*growing), strict=True))
    # Kernels of another shape round otherwise: a draw at the edge of two tokens may fall to the other side.
    assert sum(one.token_ids == two.token_ids for one, two in pairs) >= len(pairs) - 2
    for one, two in pairs:
        if one.token_ids == two.token_ids and one.logps is not None:
            torch.testing.assert_close(torch.tensor(one.logps), torch.tensor(two.logps), atol=1e-3, rtol=0)


def test_a_large_batch_is_made_anew_and_goes_on(policy, monkeypatch):
    call = {"n": 5, "max_new_tokens": 300, "stop_ids": [2, 50, 60, 70], "seed": 3}
    whole = TransformersEngine(*policy).generate(PROMPTS, **call)
    monkeypatch.setattr(fixed, "SMALL", 2)
    pairs = list(zip(chain(*whole), chain(*TransformersEngine(*policy).generate(PROMPTS, **call)), strict=True))
    assert sum(one.token_ids == two.token_ids for one, two in pairs) >= len(pairs) - 2


def test_recorded_decoding_follows_the_adapter(policy):
    model, tokenizer = policy
    engine = TransformersEngine(model, tokenizer)
    call = {"n": 2, "max_new_tokens": 40, "stop_ids": [], "temperature": 0}
    before = engine.generate(PROMPTS, **call)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(-1)
    after = engine.generate(PROMPTS, **call)
    assert before != after
    assert after == TransformersEngine(model, tokenizer, fixed_shapes=False).generate(PROMPTS, **call)


def test_engine_log_probabilities_are_the_scored_ones(policy):
    model, tokenizer = policy
    groups = TransformersEngine(model, tokenizer).generate(PROMPTS, n=4, max_new_tokens=64, stop_ids=[2], seed=1)
    answers = [sample for group in groups for sample in group]
    batch = pad_rollouts(PROMPTS, [sample.token_ids for sample in answers], 0, "cuda")
    with torch.no_grad():
        logps = score_rollouts(model, batch, temperature=1.0).logps.cpu()
    given = torch.tensor([logp for sample in answers for logp in sample.logps])
    torch.testing.assert_close(given, logps, atol=1e-3, rtol=0)


def on(device: str, batch):
    return pad_rollouts(batch.prompts, batch.answers, 0, device)


@pytest.mark.parametrize("short", [0, 4096])
def test_scores_and_gradients_are_those_of_the_cpu(policy, monkeypatch, short):
    """In buckets, and as one product."""
    monkeypatch.setitem(packing._SHORT_ROW, "cuda", short)
    model = policy[0]
    plain = copy.deepcopy(model).cpu()
    found = gradient(model, on("cuda", rollouts(20)), True)
    expected = gradient(plain, rollouts(20), True)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), two, atol=1e-4, rtol=1e-3)
    with model.disable_adapter():
        states = reference_states(model, model, on("cuda", rollouts()))
    with plain.disable_adapter():
        plain_states = reference_states(plain, plain, rollouts())
    with torch.no_grad():
        one = score_rollouts(model, on("cuda", rollouts()), temperature=0.8, reference=states)
        two = score_rollouts(plain, rollouts(), temperature=0.8, reference=plain_states)
    for name in ("entropies", "ref_logps", "kls", "leverage_norms"):
        torch.testing.assert_close(getattr(one, name).cpu(), getattr(two, name), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropies_are_exact_for_the_weights_as_they_are(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 256, generator=generator).to(dtype).cuda()
    weight = (torch.randn(50_000, 256, generator=generator) * 0.2).to(dtype).cuda()
    targets = torch.randint(0, 50_000, (300,), generator=generator).cuda()
    scores = score_tokens(hidden, weight, targets)
    logps = (hidden.double() @ weight.double().T).log_softmax(1)
    torch.testing.assert_close(scores.entropies.double(), -(logps.exp() * logps).sum(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.logps.double(), logps.gather(1, targets[:, None])[:, 0], atol=1e-4, rtol=1e-5)
    ids, values = top_alternatives(hidden, weight, 3)
    torch.testing.assert_close(values.double(), logps.gather(1, ids), atol=1e-4, rtol=1e-5)


def give_answers(trainer, lengths) -> None:
    """The trainer samples answers of these lengths, the same ones on every device."""
    generator = torch.Generator().manual_seed(2)
    answers = [torch.randint(3, 100, (length,), generator=generator).tolist() for length in lengths]

    def answer(*_, **__):
        trainer._samples = [Sample(list(ids), True) for ids in answers]
        return [list(ids) for ids in answers], None

    trainer._generate_single_turn = answer


def test_a_step_on_the_gpu_is_the_step_on_the_cpu(tiny, tmp_path):
    """The same answers, one update in float32."""
    ends = {}
    for device in ("cpu", "cuda"):
        trainer = make_trainer(tiny, tmp_path / device, use_cpu=device == "cpu", bf16=False, max_steps=1, beta=0.04)
        give_answers(trainer, (6, 2, 5, 4, 1, 6, 3, 5))
        trainer.train()
        weights = [p for n, p in trainer.model.named_parameters() if p.requires_grad]
        ends[device] = torch.cat([weight.detach().flatten().cpu() for weight in weights])
    assert ends["cpu"].abs().sum() > 0
    torch.testing.assert_close(ends["cuda"], ends["cpu"], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("scoring_dtype", ["float32", "bfloat16"])
def test_a_job_trains_in_bfloat16_and_resumes(tiny, tmp_path, scoring_dtype):
    changes = {"scoring_dtype": scoring_dtype, "max_steps": 4, "save_steps": 2, "beta": 0.04}
    whole = metrics_of(train(tiny, tmp_path / "whole", **changes))
    assert whole[0]["erpo/progress_std"] == 0 < whole[1]["erpo/progress_std"]
    assert all(metrics["grad_norm"] > 0 for metrics in whole[1:])
    start = tmp_path / "whole" / "checkpoints" / "checkpoint-2"
    again = metrics_of(train(tiny, tmp_path / "rest", resume_from=start, **changes))
    assert [metrics["reward"] for metrics in again] == [metrics["reward"] for metrics in whole[2:]]


def test_micro_batches_of_a_group_give_the_update_of_one(tiny, tmp_path):
    ends = []
    for size in (8, 4):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        trainer = make_trainer(tiny, tmp_path / str(size), use_cpu=False, bf16=False, max_steps=1, **changes)
        give_answers(trainer, (6, 2, 5, 4, 1, 6, 3, 5))
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]))
    torch.testing.assert_close(ends[0], ends[1], atol=2e-4, rtol=1e-3)
