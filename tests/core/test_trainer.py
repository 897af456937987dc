"""ERPOTrainer on a tiny model: gradients against the plain path and TRL's, records, checkpoints, resume."""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from accelerate import PartialState

from erpo_core import packing
from erpo_core.checkpoints import is_whole
from erpo_core.codec import decode_trace
from erpo_core.errors import RunError
from erpo_core.job import JobInputs, ModelInput
from erpo_core.loss import erpo_loss, response_weights
from erpo_core.specs import parse_spec
from erpo_core.specs.train import ErpoTrainSpec, GrpoTrainSpec
from erpo_core.trainer import callbacks, run
from erpo_core.trainer.config import ERPOConfig
from erpo_core.trainer.run import ERPO_ONLY, PASSED_THROUGH, make_config, run_training
from erpo_core.trainer.scoring import pad_rollouts, score_rollouts
from erpo_core.trainer.sft import make_sft_config
from tiny_model import make_tiny_model

DATASET = "reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1&size=16&seed=3"
DERIVED = {
    "model",
    "dataset",
    "prompt",
    "rewards",
    "lora",
    "load_in_4bit",
    "hardware",
    "job",
    "bf16",
    "max_length",
    "max_prompt_length",
    "preflight",
    "eval_every",
    "eval_benchmarks",
    "eval_num_samples",
    "eval_limit",
    "eval_sampling",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def policy(tiny):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model.eval()


def rollouts(common: int = 0):
    """Two groups of three; their prompts begin with ``common`` tokens that are the same."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 100, (length,), generator=generator).tolist() for length in (5, 9)]
    prompts = [[*range(10, 10 + common), *prompt] for prompt in prompts]
    lengths = (4, 1, 7, 3, 6, 2)
    return pad_rollouts(prompts, [torch.randint(3, 100, (n,), generator=generator).tolist() for n in lengths], 0, "cpu")


def gradient(model, batch, share_prompt: bool) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    scores = score_rollouts(model, batch, temperature=0.8, packed=share_prompt)
    (scores.logps * torch.linspace(-1, 1, len(scores.logps), device=scores.logps.device)).sum().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return scores.logps.detach(), torch.cat(grads)


@pytest.mark.parametrize("short", [0, 4096])
@pytest.mark.parametrize("common", [0, 20])
def test_a_prompt_computed_once_gives_the_scores_and_the_gradient_of_the_plain_path(policy, monkeypatch, common, short):
    monkeypatch.setitem(packing._SHORT_ROW, "cpu", short)
    batch = rollouts(common)
    assert len(batch.row.buckets) == (8 if common else 7)
    shared, shared_gradient = gradient(policy, batch, True)
    plain, plain_gradient = gradient(policy, batch, False)
    torch.testing.assert_close(shared, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared_gradient, plain_gradient, atol=1e-5, rtol=1e-4)
    assert plain_gradient.abs().max() > 1e-3


@pytest.mark.parametrize("common", [0, 20])
def test_scores_are_those_of_the_models_own_logits(policy, common):
    batch = rollouts(common)
    scores = score_rollouts(policy, batch, temperature=1.0)
    expected = []
    for row, mask in enumerate(batch.mask):
        group = row // batch.num_generations
        prompt = torch.tensor(batch.prompts[group])
        ids = torch.cat([prompt, batch.completion_ids[row][mask]])
        logp = policy(ids[None]).logits[0].log_softmax(1)
        expected.append(logp[len(prompt) - 1 : -1].gather(1, ids[len(prompt) :, None]).squeeze(1))
    torch.testing.assert_close(scores.logps, torch.cat(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss_type", ["erpo", "dapo", "grpo", "bnpo"])
@pytest.mark.parametrize(
    ("num_ranks", "micro_batch", "accumulation"), [(1, 12, 1), (1, 6, 2), (1, 4, 3), (2, 3, 2), (4, 1, 3)]
)
def test_the_tokens_of_a_step_weigh_one_together_whatever_the_layout(loss_type, num_ranks, micro_batch, accumulation):
    lengths = torch.tensor([4, 1, 7, 3, 6, 2, 0, 9, 5, 5, 1, 8])
    layout = {"num_generations": 6, "micro_batch": micro_batch, "accumulation": accumulation, "loss_type": loss_type}
    by_rank = lengths.view(num_ranks, -1)
    found = torch.cat([response_weights(by_rank, rank, **layout) for rank in range(num_ranks)])
    total = (found * lengths).sum().item()
    counted = (lengths > 0).float().mean().item()
    if loss_type == "grpo":  # an answer that nobody judged leaves its share behind
        assert total == pytest.approx(counted)
    elif loss_type != "bnpo" or 0 not in by_rank.view(-1, micro_batch).sum(1):
        assert total == pytest.approx(1)
    if loss_type != "bnpo":
        whole = response_weights(lengths[None], 0, **(layout | {"micro_batch": 12, "accumulation": 1}))
        torch.testing.assert_close(found, whole)


def test_the_loss_weights_of_several_steps_of_one_generation_are_each_steps_own():
    lengths = torch.tensor([[2, 4, 6, 8]])
    layout = {"num_generations": 2, "micro_batch": 2, "accumulation": 1}
    erpo = response_weights(lengths, 0, loss_type="erpo", **layout)
    dapo = response_weights(lengths, 0, loss_type="dapo", **layout)
    assert erpo.tolist() == dapo.tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 14, 1 / 14])


def test_the_loss_is_eq_5_by_hand():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    logps = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, 0.0, 0.0]])
    old = torch.tensor([[-1.0, -2.5, -0.3], [-1.0, 0.0, 0.0]])
    ref = logps - 0.2
    advantages = torch.tensor([[1.0, 2.0, -1.0], [-0.5, 9.0, 9.0]])
    layout = {"loss_type": "erpo", "num_generations": 2, "micro_batch": 2, "accumulation": 1}
    weights = response_weights(mask.sum(1)[None], 0, **layout)[:, None] * mask
    terms = erpo_loss(logps, old, ref, advantages, weights, epsilon=0.2, epsilon_high=0.2, beta=0.1)
    expected = 0.0
    for i, t in mask.nonzero().tolist():
        ratio = float((logps[i, t] - old[i, t]).exp())
        a = float(advantages[i, t])
        gap = -0.2
        expected += 0.1 * (np.exp(gap) - gap - 1) - min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
    assert terms.loss.item() == pytest.approx(expected / 4, rel=1e-5)
    assert terms.clipped_high.tolist() == [[False, True, False], [False, False, False]]
    assert terms.clipped_low.tolist() == [[False, False, False], [True, False, False]]


def test_each_field_of_the_spec_reaches_the_trainer_under_its_name(tmp_path):
    fields = set(ErpoTrainSpec.model_fields)
    assert fields == set(PASSED_THROUGH) | set(ERPO_ONLY) | DERIVED
    defaults = ERPOConfig(str(tmp_path), use_cpu=True)
    spec = parse_spec("train", {"model": "m", "dataset": "d", "max_completion_length": 64})
    config = make_config(spec, tmp_path, bf16=False)
    for name in (*PASSED_THROUGH, *ERPO_ONLY):
        assert getattr(config, name) == getattr(spec, name), name
        if name not in (
            "save_steps",
            "save_total_limit",
            "trace_every",
            "generation_batch_size",
            "max_completion_length",
        ):
            assert getattr(defaults, name) == getattr(spec, name), name
    assert set(GrpoTrainSpec.model_fields) >= set(PASSED_THROUGH)


@pytest.mark.parametrize("algorithm", ["grpo", "sft"])
def test_on_a_cpu_many_long_answers_are_scored_a_part_at_a_time(tmp_path, monkeypatch, algorithm):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sizes = {"grpo": {"generation_batch_size": 512, "max_completion_length": 4000}, "sft": {"train_batch_size": 512}}
    body = {"model": "m", "dataset": "d", "algorithm": algorithm, "max_length": 4096}
    spec = parse_spec("train", body | sizes[algorithm])
    config = {"grpo": make_config, "sft": make_sft_config}[algorithm](spec, tmp_path, bf16=False)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (16, 32)


@pytest.mark.parametrize("num_gpus", [0, 1])
@pytest.mark.parametrize("algorithm", ["erpo", "sft"])
def test_a_process_that_sees_several_gpus_trains_on_one(tmp_path, monkeypatch, request, algorithm, num_gpus):
    request.addfinalizer(PartialState._reset_state)  # what comes after finds a CPU
    for name, found in (("is_available", True), ("device_count", 2), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, found=found: found)
    body = {"model": "m", "dataset": "d", "algorithm": algorithm, "hardware": {"num_gpus": num_gpus}}
    body |= {} if algorithm == "sft" else {"max_completion_length": 64}
    config = {"erpo": make_config, "sft": make_sft_config}[algorithm](parse_spec("train", body), tmp_path, bf16=False)
    assert config.device.type == "cuda"
    assert config.n_gpu == 1, "more is nn.DataParallel, which TRL refuses"
    assert config.train_batch_size == config.per_device_train_batch_size


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("importance_sampling_level", "sequence"),
        ("scale_rewards", "batch"),
        ("use_liger_kernel", True),
        ("sync_ref_model", True),
        ("top_entropy_quantile", 0.0),
        ("loss_type", "sapo"),
        ("algorithm", "ppo"),
        ("max_completion_length", None),
        ("temperature", 0.0),
        ("noise_floor_every", 0),
        ("num_buckets", 0),
        ("advantage_clip", 0.0),
        ("advantage_clip", -1.0),
        ("advantage_clip", float("nan")),
        ("stabilizer", 0.0),
        ("progress_scale", 0.0),
        ("gate_scale", -1.0),
        ("synthesis_weight", -0.5),
        ("psi_std", float("nan")),
        ("top_p", 0.0),
        ("max_skipped_steps", -1),
        ("trace_groups", 0),
        ("entropy_ema_decay", 1.0),
        ("progress_noise_floor", "none"),
        ("scoring_dtype", "bfloat16"),
    ],
)
def test_what_would_undo_erpo_is_refused_by_name(tmp_path, option, value):
    with pytest.raises(ValueError, match=option):
        ERPOConfig(str(tmp_path), use_cpu=True, **{option: value})


class Records:
    """A sink that keeps everything, and a stop that is asked for once a step's metrics have come."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.by_kind = defaultdict(list)
        self._stop_after = stop_after

    def emit(self, record) -> None:
        self.by_kind[record.kind].append(record)

    @property
    def requested(self) -> bool:
        return self._stop_after is not None and len(self.by_kind["metrics"]) >= self._stop_after


def train(tiny, work_dir, *, stop_after=None, resume_from=None, records=None, **changes) -> Records:
    body = {
        "model": str(tiny),
        "dataset": DATASET,
        "num_generations": 4,
        "generation_batch_size": 8,
        "max_completion_length": 8,
        "max_length": 400,
        "max_steps": 4,
        "save_steps": 2,
        "preflight": False,
        "trace_every": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "lora": {"r": 4, "lora_alpha": 8},
        # A reward that the random model can earn: otherwise every group is dead.
        "rewards": [{"name": "accuracy"}, {"name": "regex", "args": {"pattern": "[0-9a-f]"}}],
    }
    inputs = JobInputs(
        job_id="job",
        run_id="run",
        attempt=1,
        work_dir=work_dir,
        cache_dir=work_dir / "cache",
        model=ModelInput(str(tiny)),
        model_roots=(tiny.parent,),
        resume_from=resume_from,
    )
    records = records or Records(stop_after)
    torch.manual_seed(0)
    run_training(parse_spec("train", body | changes), inputs, records, records)
    return records


def test_answers_that_hang_are_waited_for_side_by_side(tiny, tmp_path, monkeypatch):
    def verifier(*, processes):
        raise RunError(f"{processes} processes")

    monkeypatch.setattr(run, "Verifier", verifier)
    monkeypatch.setattr(run.os, "cpu_count", lambda: 64)
    with pytest.raises(RunError, match="4 processes"):
        train(tiny, tmp_path)


def test_a_run_reports_metrics_completions_traces_and_checkpoints(tiny, tmp_path):
    records = train(tiny, tmp_path)
    metrics = records.by_kind["metrics"]
    assert [record.step for record in metrics] == [1, 2, 3, 4]
    wanted = {"loss", "reward", "rewards/accuracy", "entropy", "kl", "grad_norm", "learning_rate", "tokens_per_second"}
    assert wanted | {"erpo/frac_dead_groups", "erpo/progress_snr", "time/generate"} <= set(metrics[0].values)
    assert any(record.values["grad_norm"] > 0 for record in metrics)
    rows = [row for record in records.by_kind["completions"] for row in record.rows]
    assert len(rows) == 32
    assert all(row["verdict"] in ("wrong", "unparsable", "right") for row in rows)
    verdicts = {f"verdict/{name}" for name in ("right", "wrong", "unparsable", "timeout", "crashed")}
    assert sum(metrics[0].values[name] for name in verdicts) == pytest.approx(1)
    for checkpoint in records.by_kind["checkpoint"]:
        assert is_whole(tmp_path / "checkpoints" / f"checkpoint-{checkpoint.step}")
    live = [trace for trace in records.by_kind["trace"] if trace.meta["advantage"]]
    assert live
    for trace in live:
        columns = decode_trace(trace.payload)
        assert len(columns["entropy"]) == len(trace.meta["tokens"]) == trace.meta["num_tokens"]
        assert np.abs(columns["advantage"]).max() > 0
    rows = {(c.step, r["prompt_id"], r["sample"]): r for c in records.by_kind["completions"] for r in c.rows}
    for trace in records.by_kind["trace"]:
        row = rows[trace.step, trace.meta["prompt_id"], trace.meta["sample"]]
        assert (trace.meta["verdict"], trace.meta["reward"]) == (row["verdict"], row["reward"])


def test_progress_is_told_while_the_answers_of_a_step_grow(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "_TELL_SECONDS", -1)
    records = train(tiny, tmp_path, max_steps=2, trace_every=0)
    told = [record for record in records.by_kind["progress"] if "sampled_answers" in record.data]
    for done, metrics in enumerate(records.by_kind["metrics"]):
        of_step = [record.data for record in told if record.done == done]
        assert [data["sampled_answers"] for data in of_step] == sorted(data["sampled_answers"] for data in of_step)
        assert of_step[-1]["sampled_answers"] == 8
        assert of_step[-1]["sampled_tokens"] == metrics.values["completions/sampled_tokens"]


@pytest.mark.parametrize("entropy_stats", ["group", "ema"])
def test_numpy_rebuilds_every_signal_from_the_stored_traces(tiny, tmp_path, entropy_stats):
    """erpo-spec, eqs. 8-10, from the channels entropy and progress, A_i, the floor and the gate's statistics alone."""
    settings = {"synthesis_weight": 0.7, "num_buckets": 3, "entropy_stats": entropy_stats, "entropy_ema_decay": 0.5}
    records = train(tiny, tmp_path, max_steps=3, **settings)
    groups = defaultdict(list)
    for trace in records.by_kind["trace"]:
        groups[trace.step, trace.meta["group"]].append(trace)
    rebuilt = 0
    for traces in groups.values():
        rows = [decode_trace(trace.payload) for trace in traces]
        a = np.concatenate([np.full(len(r["entropy"]), t.meta["advantage"]) for r, t in zip(rows, traces, strict=True)])
        stored = {name: np.concatenate([r[name] for r in rows]).astype(float) for name in rows[0]}
        known = traces[0].meta["group_stats"]
        h, s = stored["entropy"], stored["progress"]
        own = (h.mean(), h.std()) == pytest.approx((known["entropy_mean"], known["entropy_std"]), rel=1e-5)
        assert own == (entropy_stats == "group" or traces[0].step == 1)
        gates = 1 / (1 + np.exp(-(h - known["entropy_mean"]) / (known["entropy_std"] + 1e-6)))
        np.testing.assert_allclose(stored["gate"], gates, atol=5e-4)
        buckets = np.concatenate([np.arange(len(r["entropy"])) * 3 // len(r["entropy"]) for r in rows])
        z = np.zeros_like(s)
        for bucket in range(3):
            here = buckets == bucket
            if here.sum() > 1 and s[here].std() > known["noise_floor"]:
                z[here] = (s[here] - s[here].mean()) / (s[here].std() + 1e-6)
        np.testing.assert_allclose(stored["normalized_progress"], z, atol=0.02)
        if not a.any():
            assert not stored["advantage"].any()
            continue
        psi = gates * np.sign(a) * z
        psi = psi / (psi[a != 0].std() + 1e-6) if psi.any() else psi
        np.testing.assert_allclose(stored["psi"], psi, atol=0.03)
        combined = a + 0.7 * psi
        np.testing.assert_allclose(stored["advantage"], (combined - combined.mean()) / combined.std(), atol=0.03)
        rebuilt += bool(psi.any())
    assert rebuilt


def test_the_first_step_of_a_fresh_adapter_has_no_progress_and_is_grpo(tiny, tmp_path):
    erpo = train(tiny, tmp_path / "erpo", max_steps=1)
    grpo = train(tiny, tmp_path / "grpo", max_steps=1, algorithm="grpo")
    first = erpo.by_kind["metrics"][0].values
    assert first["erpo/progress_std"] == 0
    assert first["erpo/frac_silent_buckets"] == 1
    rows = [[r["completion"] for r in run.by_kind["completions"][0].rows] for run in (erpo, grpo)]
    assert rows[0] == rows[1]


@pytest.mark.bitwise
def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(tiny, tmp_path):
    whole = train(tiny, tmp_path / "whole")
    stopped = train(tiny, tmp_path / "part", stop_after=3)
    assert [c.step for c in stopped.by_kind["checkpoint"]] == [2, 3], "3 is no multiple of save_steps"
    assert stopped.by_kind["result"] == []
    resumed = train(tiny, tmp_path / "rest", resume_from=tmp_path / "part" / "checkpoints" / "checkpoint-3")
    kept = [r.values for r in whole.by_kind["metrics"]]
    again = [r.values for r in (*stopped.by_kind["metrics"], *resumed.by_kind["metrics"])]
    assert len(kept) == len(again) == 4
    for one, two in zip(kept, again, strict=True):
        for name in ("loss", "reward", "entropy", "kl", "grad_norm", "learning_rate"):
            assert one[name] == two[name], name


def test_a_checkpoint_loads_with_plain_peft(tiny, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    train(tiny, tmp_path, max_steps=2)
    folder = tmp_path / "checkpoints" / "checkpoint-2"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder)
    assert any(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_a_damaged_checkpoint_is_refused(tiny, tmp_path):
    train(tiny, tmp_path / "part", max_steps=2)
    folder = tmp_path / "part" / "checkpoints" / "checkpoint-2"
    assert json.loads((folder / "manifest.json").read_text())["step"] == 2
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert not is_whole(folder)
    records = Records()
    with pytest.raises(RunError) as caught:
        train(tiny, tmp_path / "rest", resume_from=folder, records=records)
    assert caught.value.code == "checkpoint_damaged"
    assert records.by_kind["metrics"] == []
