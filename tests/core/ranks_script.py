"""One process of a distributed training: ``ranks_script.py MODEL OUT LAYOUT`` writes the weights after some steps.

Layout: ``per_device,accumulation,steps_per_generation,loss_type,entropy_stats[,dynamic]``. Every layout samples and
rewards the same way: the answers come from a fixed table, so that only the split over ranks and micro-batches differs.
"""

import json
import os
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from erpo_core import ERPOConfig, ERPOTrainer
from erpo_core.generation.base import Sample

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
            found.append(answer(ord(number[0]), (first + row) % G))
        self._samples = [Sample(ids, True) for ids in found]
        return found, None


def reward(completion_ids, **_):
    return [float(sum(ids) % 3 == 0) + 0.5 * (ids[0] % 2) for ids in completion_ids]


def reward_of_every_other_prompt(completion_ids, prompts, **_):
    """The answers to the others are all worth nothing."""
    rewards = zip(prompts, reward(completion_ids), strict=True)
    return [value if ord(prompt[0]) % 2 else 0.0 for prompt, value in rewards]


def main(model: str, out: str, layout: str) -> None:
    per_device, accumulation, steps_per_generation, loss_type, entropy_stats, *dynamic = layout.split(",")
    args = ERPOConfig(
        out,
        num_generations=G,
        per_device_train_batch_size=int(per_device),
        gradient_accumulation_steps=int(accumulation),
        steps_per_generation=int(steps_per_generation),
        loss_type=loss_type,
        entropy_stats=entropy_stats,
        max_completion_length=12,
        max_steps=3,
        learning_rate=1.0,
        optim="sgd",
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1e9,
        save_strategy="no",
        progress_noise_floor=1e-6,
        use_cpu=True,
        disable_tqdm=True,
        shuffle_dataset=False,
        dynamic_sampling=bool(dynamic),
    )
    trainer = FixedAnswers(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=reward_of_every_other_prompt if dynamic else reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [chr(65 + i) + "=" * (i % 3) for i in range(3 * PROMPTS)]}),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save({n: p.detach() for n, p in trainer.model.named_parameters() if "lora_" in n}, f"{out}/weights.pt")
        logs = [entry for entry in trainer.state.log_history if "reward" in entry]
        with open(f"{out}/logs.json", "w") as file:
            json.dump(logs, file)


if __name__ == "__main__":
    os.makedirs(sys.argv[2], exist_ok=True)
    main(*sys.argv[1:])
