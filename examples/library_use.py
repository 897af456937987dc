"""ERPO in place of TRL's GRPOTrainer: ``python examples/library_use.py Qwen/Qwen2.5-0.5B-Instruct out``."""

import sys

from datasets import Dataset
from peft import LoraConfig

from erpo_core import ERPOConfig, ERPOTrainer


def accuracy(completions, answer, **kwargs):
    return [float(f"\\boxed{{{gold}}}" in turns[0]["content"]) for turns, gold in zip(completions, answer, strict=True)]


def train(model: str, output_dir: str, **options) -> ERPOTrainer:
    sums = [(f"What is {a} + {b}? Put the answer in \\boxed{{}}.", str(a + b)) for a in range(20) for b in range(20)]
    rows = [{"prompt": [{"role": "user", "content": question}], "answer": answer} for question, answer in sums]
    trainer = ERPOTrainer(
        model=model,
        reward_funcs=accuracy,
        args=ERPOConfig(output_dir, **{"max_completion_length": 128, "learning_rate": 1e-4} | options),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    train(*sys.argv[1:3])
