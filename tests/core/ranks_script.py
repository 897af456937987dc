"""One process of several that train together: ``ranks_script.py MODEL OUT CASES`` runs one case after the other.

A case is a JSON object with ``name``, ``kind`` and what its function takes; what it found is written to OUT/name. In
``update`` the answers come from a fixed table: every layout samples and rewards the same way, so that only the split
over ranks and micro-batches differs. In the others the policy samples.
"""

import json
import sys
from functools import wraps
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from erpo_core import ERPOConfig, ERPOTrainer
from erpo_core.generation.base import Sample
from erpo_core.job import LeftEarlyError
from erpo_core.trainer import saving
from erpo_core.trainer.sharding import is_sharded, whole
from erpo_core.trainer.zero import engine_of
from workers.child.ranks import end_rank

G, PROMPTS = 4, 4


def answer(prompt: int, sample: int) -> list[int]:
    generator = torch.Generator().manual_seed(100 * prompt + sample)
    return torch.randint(3, 250, (1 + (3 * prompt + 5 * sample) % 9,), generator=generator).tolist()


class FixedAnswers(ERPOTrainer):
    """Answers by prompt and place in its group, whatever rank samples them."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        rows = len(prompt_ids)
        first = self.accelerator.process_index * rows
        found = []
        for row, ids in enumerate(prompt_ids):
            number = self.processing_class.decode(ids)
            found.append(answer(ord(number[0]), (first + row) % self.num_generations))
        self._samples = [Sample(ids, True) for ids in found]
        return found, None


def reward(completion_ids, **_):
    return [float(sum(ids) % 3 == 0) + 0.5 * (ids[0] % 2) for ids in completion_ids]


def half_judged(completion_ids, **_):
    """Nothing about the second half of each group, which on two ranks is all that the second one has."""
    judged = [answer(ord("A") + i, sample) for i in range(3 * PROMPTS) for sample in range(G // 2)]
    return [float(sum(ids) % 3 == 0) if ids in judged else None for ids in completion_ids]


def reward_of_every_other_prompt(completion_ids, prompts, **_):
    """The answers to the others are all worth nothing."""
    rewards = zip(prompts, reward(completion_ids), strict=True)
    return [value if ord(prompt[0]) % 2 else 0.0 for prompt, value in rewards]


def with_verdicts(function):
    """The function, and a verdict on each answer, as the reward ``accuracy`` has it."""

    @wraps(function)
    def judge(**columns):
        values = function(**columns)
        judge.last_verdicts = ["right" if value else "wrong" for value in values]
        return values

    return judge


REWARDS = {
    "all": with_verdicts(reward),
    "half": with_verdicts(half_judged),
    "every other prompt": with_verdicts(reward_of_every_other_prompt),
}


def policy(folder: str, tuning: str):
    """``lora`` (the trainer adds it), ``untied`` (the same, with a head of its own, of a family that also names
    layers which it has where it reads images), ``full``, or ``warm``: an adapter
    that was trained before, which makes the reference an adapter as well."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if tuning == "untied":
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model._no_split_modules = [*model._no_split_modules, "VisionBlock"]
    if tuning != "warm":
        return model
    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def trainer_of(
    kind: type[ERPOTrainer], model: str, prompts: list[str], *, tuning: str, judged="all", num_generations=G, **settings
):
    return kind(
        model=policy(model, tuning),
        reward_funcs=REWARDS[judged],
        args=ERPOConfig(
            num_generations=num_generations,
            warmup_steps=0,
            weight_decay=0.0,
            max_completion_length=12,
            lr_scheduler_type="constant",
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if tuning in ("lora", "untied") else None,
    )


def sampling_trainer(kind: type[ERPOTrainer], model: str, out: Path, *, tuning: str = "lora", **settings):
    """One that samples itself, four answers a rank and step."""
    return trainer_of(
        kind,
        model,
        [f"{a}+{a}=" for a in range(12)],
        tuning=tuning,
        output_dir=str(out),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        learning_rate=1e-2,
        **settings,
    )


def update(model: str, out: Path, layout: str, tuning: str = "lora", **settings) -> None:
    """Three steps of plain gradient descent."""
    settings = {"max_grad_norm": 1e9, "progress_noise_floor": 1e-6} | settings
    per_device, accumulation, steps_per_generation, loss_type, entropy_stats = layout.split(",")
    trainer = trainer_of(
        FixedAnswers,
        model,
        [chr(65 + i) + "=" * (i % 3) for i in range(3 * PROMPTS)],
        tuning=tuning,
        output_dir=str(out),
        per_device_train_batch_size=int(per_device),
        gradient_accumulation_steps=int(accumulation),
        steps_per_generation=int(steps_per_generation),
        loss_type=loss_type,
        entropy_stats=entropy_stats,
        max_steps=3,
        learning_rate={"lora": 1.0, "untied": 1.0, "full": 0.02, "warm": 0.05}[tuning],
        optim="sgd",
        save_strategy="no",
        shuffle_dataset=False,
        trace_every=2,
        trace_groups=PROMPTS,
        **settings,
    )
    trainer.keeps_rollouts, trainer.keeps_traces = trainer.is_world_process_zero(), True
    trainer.train()
    report(trainer, out)
    if trainer.keeps_rollouts:
        traces = [
            [trace.step, trace.number, [answer.channels["advantage"].tolist() for answer in trace.answers]]
            for trace in trainer.traces
        ]
        (out / "traces.json").write_text(json.dumps(traces))


def resume(model: str, out: Path, tuning: str = "lora", steps: int = 6, at: int = 3, **settings) -> None:
    """So many steps, and those after ``at`` again from its checkpoint. On two ranks an epoch has six."""
    for name, source in (("whole", None), ("again", out / "whole" / f"checkpoint-{at}")):
        trainer = sampling_trainer(
            ERPOTrainer,
            model,
            out / name,
            tuning=tuning,
            max_steps=steps,
            save_strategy="steps",
            save_steps=at,
            noise_floor_every=2,
            seed=7,
            **settings,
        )
        trainer.keeps_rollouts = True
        with patch.object(saving, "whole_state", wraps=saving.whole_state) as states:
            trainer.train(resume_from_checkpoint=None if source is None else str(source))
        report(trainer, out / name)
        if states.called:
            held = saving.whole_state(trainer.optimizer, **states.call_args.kwargs)["state"]
            sizes = [value.numel() for values in held.values() for value in values.values() if value.ndim]
            (out / name / f"held-{trainer.accelerator.process_index}.json").write_text(json.dumps(sum(sizes)))
        prompts = [[example["prompt"] for example in batch.examples] for batch in trainer.rollout_log]
        (out / name / f"prompts-{trainer.accelerator.process_index}.json").write_text(json.dumps(prompts))


def sft(model: str, out: Path, hardware: dict, data_root: str, lora: dict | None, bf16: bool = False) -> None:
    """A job of supervised fine-tuning; its checkpoint and its metrics."""
    from erpo_core.job import JobInputs, ModelInput
    from erpo_core.specs import parse_spec
    from erpo_core.trainer.sft import run_sft

    body = {
        "algorithm": "sft",
        "model": model,
        "dataset": "data:sums.jsonl",
        "max_length": 128,
        "train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_steps": 3,
        "save_steps": 3,
        "lora": lora,
        "bf16": bf16,
        "hardware": hardware,
        "eval_every": 3,
        "eval_benchmarks": ["data:sums.jsonl"],
        "eval_sampling": {"max_completion_length": 4},
    }
    inputs = JobInputs(
        job_id="job",
        run_id="run",
        attempt=1,
        work_dir=out,
        cache_dir=out / "cache",
        model=ModelInput(model),
        data_root=Path(data_root),
        model_roots=(Path(model).parent,),
    )
    records: list = []
    run_sft(parse_spec("train", body), inputs, SimpleNamespace(emit=records.append), SimpleNamespace(requested=False))
    logs = [record.values for record in records if record.kind == "metrics" and "loss" in record.values]
    if logs:
        (out / "logs.json").write_text(json.dumps(logs))


def report(trainer: ERPOTrainer, out: Path) -> None:
    """Weights and metrics, by the first process."""
    weights = {n: whole(p) for n, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}
    sharded = how_sharded(trainer.model)
    if trainer.is_world_process_zero():
        torch.save({"weights": weights, "sharded": sharded}, out / "weights.pt")
        logs = [entry for entry in trainer.state.log_history if "reward" in entry]
        (out / "logs.json").write_text(json.dumps(logs))


def how_sharded(model) -> str | None:
    engine = engine_of(model)
    return f"ZeRO-{engine.zero_optimization_stage()}" if engine else "FSDP2" if is_sharded(model) else None


def not_finite(model: str, out: Path, **settings) -> None:
    """Three steps; the second one's loss is not a number on one of the ranks."""

    class Broken(ERPOTrainer):
        def _compute_loss(self, model, inputs):
            broken = self.state.global_step == 1 and self.accelerator.process_index == 1
            return super()._compute_loss(model, inputs) * (float("nan") if broken else 1.0)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            versions.append(fingerprint())

    trainer = sampling_trainer(Broken, model, out, max_steps=3, save_strategy="no", **settings)

    def fingerprint() -> list[float]:
        return [whole(p).double().sum().item() for p in trainer.model.parameters() if p.requires_grad]

    versions = [fingerprint()]
    trainer.add_callback(Watch())
    trainer.train()
    if trainer.is_world_process_zero():
        logs = [entry for entry in trainer.state.log_history if "reward" in entry]
        found = {
            "moved": [before != after for before, after in pairwise(versions)],
            "skipped": [entry["erpo/skipped_steps"] for entry in logs],
        }
        (out / "found.json").write_text(json.dumps(found))


def leave(model: str, out: Path, **settings) -> None:
    """The second rank is asked to leave while the answers of the third step grow."""

    class Asked(ERPOTrainer):
        def watch(self, tokens, ended):
            if self.state.global_step == 2 and self.accelerator.process_index == 1:
                raise LeftEarlyError

    trainer = sampling_trainer(Asked, model, out, max_steps=6, save_steps=4, **settings)
    try:
        trainer.train()
    except LeftEarlyError:
        trainer.save_now()
        (out / f"left-{trainer.accelerator.process_index}").touch()


def main(model: str, out: str, cases: str) -> None:
    kinds = {"update": update, "resume": resume, "sft": sft, "not_finite": not_finite, "leave": leave}
    for case in json.loads(cases):
        folder = Path(out) / case.pop("name")
        folder.mkdir(parents=True, exist_ok=True)
        kinds[case.pop("kind")](model, folder, **case)


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_rank(leaves_group=True)
