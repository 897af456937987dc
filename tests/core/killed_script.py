"""A training that kills itself: a run with MODEL OUT [POINT:STEP] resumes from what is whole and goes on.

Points: ``generate``, ``backward``, ``save`` (transformers' files half written), ``publish`` (all written, no name yet),
``saved`` (named, nobody told).
"""

import json
import os
import signal
from pathlib import Path

import torch
from datasets import Dataset
from forked import serve
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from erpo_core import ERPOConfig, ERPOTrainer, checkpoints


def reward(completion_ids, **_):
    return [float(ids[0] % 2 == 0) + 0.1 * (len(ids) % 3) for ids in completion_ids]


class Mortal(ERPOTrainer):
    """Dies at a point of a step."""

    point, step = "", -1

    def _die_at(self, point: str) -> None:
        if (self.point, self.step) == (point, self.state.global_step):
            os.kill(os.getpid(), signal.SIGKILL)

    def _engine(self):
        engine = super()._engine()
        choose = engine._choose
        engine._choose = lambda drawn, alive, step: (
            self._die_at("generate") if step == 2 else None,
            choose(drawn, alive, step),
        )[1]
        return engine

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        loss.register_hook(lambda gradient: self._die_at("backward"))
        return loss

    def _save_rng_state(self, output_dir):
        self._die_at("save")
        super()._save_rng_state(output_dir)


class Log(TrainerCallback):
    def __init__(self, path: Path) -> None:
        self._path = path

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in logs:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def main(model: str, folder: str, death: str = "") -> None:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    trainer = Mortal(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=reward,
        args=ERPOConfig(
            str(out),
            num_generations=4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_completion_length=8,
            num_train_epochs=2,
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            noise_floor_every=3,
            entropy_stats="ema",
            seed=7,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"{a}+{a}=" for a in range(8)]}),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        callbacks=[Log(out / "log.jsonl")],
    )
    if death:
        trainer.point, trainer.step = death.split(":")[0], int(death.split(":")[1])
        rename = checkpoints.publish
        checkpoints.publish = lambda *given: (trainer._die_at("publish"), rename(*given), trainer._die_at("saved"))
    trainer.train(resume_from_checkpoint=True)
    torch.save(
        {
            "weights": {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad},
            "optimizer": trainer.optimizer.state_dict()["state"],
        },
        out / "end.pt",
    )


if __name__ == "__main__":
    serve(main)
