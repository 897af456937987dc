"""The trainers that ``train_step.py`` compares, on the same prompts, with answers of the same lengths."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from results import synced
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor
from trl import GRPOConfig, GRPOTrainer

from erpo_core import ERPOConfig, ERPOTrainer
from erpo_core.generation.base import Sample
from erpo_core.generation.transformers import TransformersEngine

ARMS = {
    "a": "TRL GRPOTrainer",
    "b": "ERPO Lab, algorithm=grpo",
    "c": "ERPO Lab, algorithm=erpo",
    "v": "ERPO Lab, algorithm=erpo, use_vllm",
}
GROUP_SIZE = 8


@dataclass(frozen=True)
class Case:
    """What all arms compute."""

    model: Path
    dtype: str
    prompt_length: int
    lengths: tuple[int, ...]
    """Tokens of each answer, its end included; one entry a response, groups adjacent."""
    beta: float = 0.04

    @property
    def bf16(self) -> bool:
        return self.dtype == "bfloat16"


class ForcedEnds(LogitsProcessor):
    """transformers' generation: answer i ends at its length and nowhere before."""

    def __init__(self, lengths: Sequence[int], end: int) -> None:
        self._lengths, self._end, self._step = torch.tensor(lengths), end, 0

    def __call__(self, input_ids, scores):
        self._step += 1
        scores[:, self._end] = float("-inf")
        done = (self._lengths == self._step).to(scores.device)
        scores[done] = float("-inf")
        scores[done, self._end] = 0.0
        return scores


class ForcedEngine(TransformersEngine):
    """The same for our engine."""

    lengths: torch.Tensor
    end: int

    def _choose(self, drawn, alive, step):
        drawn = torch.where(drawn == self.end, (drawn + 7) % 1000 + 100, drawn)
        return torch.where(self.lengths[alive] == step + 1, self.end, drawn)


def fixed_rewards(completion_ids, **_) -> list[float]:
    """Some right, some wrong in every group, whatever was sampled."""
    return [float(row % 3 == 0) for row in range(len(completion_ids))]


class TrlArm:
    """TRL's trainer as it is, its phases timed from outside."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.trainer = self._make(folder)
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1
        self.rows = make_rows(case, self.trainer.processing_class)

    def _make(self, folder: Path) -> GRPOTrainer:
        config = GRPOConfig(
            str(folder),
            beta=self.case.beta,
            loss_type="bnpo",
            use_bias_correction_kl=False,
            disable_dropout=True,
            **shared_settings(self.case),
        )
        trainer = make_trainer(GRPOTrainer, config, self.case)
        model = trainer.accelerator.unwrap_model(trainer.model)
        generate = model.generate
        end = trainer.processing_class.eos_token_id

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = generate(*args, logits_processor=[ForcedEnds(self.case.lengths, end)], **kwargs)
            self.seconds["generate"] += synced(start)
            return found

        model.generate = timed
        score = trainer._get_per_token_logps_and_entropies

        def timed_score(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = score(*args, **kwargs)
            self.seconds["forward" if torch.is_grad_enabled() else "reference"] += synced(start)
            return found

        trainer._get_per_token_logps_and_entropies = timed_score
        return trainer

    def step(self) -> dict[str, float]:
        """One optimizer step; seconds of its phases."""
        self.seconds.clear()
        trainer, start = self.trainer, time.perf_counter()
        trainer.model.train()
        trainer.training_step(trainer.model, self.rows, None)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        self.seconds["step"] = synced(start)
        trainer.state.global_step += 1
        return self.phases()

    def phases(self) -> dict[str, float]:
        found = dict(self.seconds)
        named = sum(found.get(name, 0.0) for name in ("generate", "reference", "forward"))
        return found | {"backward and rest": found["step"] - named, "noise": 0.0}


class OurArm(TrlArm):
    """ERPOTrainer with one of its algorithms."""

    def __init__(self, case: Case, folder: Path, *, algorithm: str, use_vllm: bool = False) -> None:
        self.algorithm, self.use_vllm = algorithm, use_vllm
        super().__init__(case, folder)

    def _make(self, folder: Path) -> ERPOTrainer:
        config = ERPOConfig(
            str(folder),
            algorithm=self.algorithm,
            beta=self.case.beta,
            progress_noise_floor="auto",
            scoring_dtype=self.case.dtype,
            use_vllm=self.use_vllm,
            vllm_max_model_length=self.case.prompt_length + max(self.case.lengths),
            **shared_settings(self.case),
        )
        return make_trainer(ForcedTrainer, config, self.case)

    def phases(self) -> dict[str, float]:
        seconds = self.trainer._seconds
        found = {name: seconds[name] for name in ("generate", "reference", "forward", "noise")}
        seconds.clear()
        return found | {"step": self.seconds["step"], "backward and rest": self.seconds["step"] - sum(found.values())}


class ForcedTrainer(ERPOTrainer):
    """Answers of the wanted lengths."""

    lengths: tuple[int, ...]

    def _engine(self):
        engine, end = super()._engine(), self.processing_class.eos_token_id
        if self.args.use_vllm:
            return ForcedVLLM(engine, self.lengths, end)
        forced = ForcedEngine(engine.model, engine.tokenizer)
        forced.lengths, forced.end = torch.tensor(self.lengths, device=engine.model.device), end
        return forced


class ForcedVLLM:
    """The same for vLLM: a request for each answer, with a length of its own."""

    def __init__(self, engine: Any, lengths: Sequence[int], end: int) -> None:
        self._engine, self._lengths, self._end = engine, lengths, end

    def generate(self, prompts, *, n: int, temperature, top_p, top_k, max_new_tokens, stop_ids, seed):
        each = [prompt for prompt in prompts for _ in range(n)]
        call = self._engine._call(each, 1, temperature, top_p, top_k, max_new_tokens, (), seed)
        for (_, params), length in zip(call.requests, self._lengths, strict=True):
            params.max_tokens = length
        with torch.autocast("cpu", enabled=False):
            samples = [group[0] for group in next(self._engine._serve(iter([call])))]
        ended = [Sample([*sample.token_ids[:-1], self._end], True, sample.logps) for sample in samples]
        return [ended[start : start + n] for start in range(0, len(ended), n)]


class FixedAnswers:
    """Put on an arm: the same answers at every step, so that a step is all but the sampling."""

    def __init__(self, arm: TrlArm) -> None:
        trainer, case = arm.trainer, arm.case
        generator = torch.Generator().manual_seed(11)
        end = trainer.processing_class.eos_token_id
        answers = [
            [*torch.randint(1000, 40_000, (length - 1,), generator=generator).tolist(), end] for length in case.lengths
        ]

        def answer(*_args: Any, **_kwargs: Any):
            trainer._samples = [Sample(list(ids), True) for ids in answers]
            return [list(ids) for ids in answers], None

        trainer._generate_single_turn = answer


def make_arm(name: str, case: Case, folder: Path) -> TrlArm:
    """One of ``ARMS``."""
    if name == "a":
        return TrlArm(case, folder)
    return OurArm(case, folder, algorithm="grpo" if name == "b" else "erpo", use_vllm=name == "v")


def shared_settings(case: Case) -> dict[str, Any]:
    """The same for every arm, by TRL's names."""
    return {
        "num_generations": GROUP_SIZE,
        "per_device_train_batch_size": len(case.lengths),
        "gradient_accumulation_steps": 1,
        "max_completion_length": max(case.lengths),
        "learning_rate": 5e-6,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.001,
        "gradient_checkpointing": False,
        "bf16": case.bf16,
        "temperature": 1.0,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def make_trainer(cls: Any, config: GRPOConfig, case: Case) -> GRPOTrainer:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(case.model)
    cls.lengths = case.lengths
    return cls(
        model=AutoModelForCausalLM.from_pretrained(case.model, dtype=getattr(torch, case.dtype)),
        reward_funcs=fixed_rewards,
        args=config,
        train_dataset=Dataset.from_list(make_rows(case, tokenizer)[::GROUP_SIZE]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def make_rows(case: Case, tokenizer: Any) -> list[dict[str, str]]:
    """Prompts of exactly ``prompt_length`` tokens, one row a response."""
    rows = []
    for number in range(len(case.lengths) // GROUP_SIZE):
        text = " ".join(str(place + number) for place in range(400))
        ids = tokenizer(text)["input_ids"][: case.prompt_length]
        rows += [{"prompt": tokenizer.decode(ids)}] * GROUP_SIZE
    return rows
