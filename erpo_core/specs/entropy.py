"""The body of `POST /analyze/entropy`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from erpo_core.specs.common import HardwareSpec, JobOptions, ModelRef, PromptSpec, SamplingSpec, Spec, Text


class TextPair(Spec):
    """A prompt and the response whose tokens are scored. The prompt is a problem: the template is applied to it."""

    prompt: Text
    response: Text


class DetectorSpec(Spec):
    """How Critical Decision Pivots (CDPs) are found; recomputed from stored entropies at any time."""

    kind: Literal["quantile", "absolute", "zscore", "gate", "transient"] = "quantile"
    scope: Literal["sequence", "group", "run"] = "sequence"
    fraction: float = Field(0.05, gt=0, le=1, description="`quantile`: share of tokens, exactly ceil(fraction n).")
    threshold: float | None = Field(
        None, description="Nats (`absolute`), sigmas (`zscore`), W (`gate`), prominence (`transient`)."
    )
    min_entropy: float = Field(0.0, ge=0, description="Tokens below it (nats) are never pivots.")


class EntropySpec(Spec):
    """Per-token entropy of texts, or of answers sampled to prompts, by one teacher-forced pass."""

    model: ModelRef
    prompts: tuple[Text, ...] = Field((), max_length=10_000, description="Problems; answers are sampled.")
    texts: tuple[TextPair, ...] = Field((), max_length=10_000, description="Given answers; nothing is sampled.")
    prompt: PromptSpec = PromptSpec()
    sampling: SamplingSpec = SamplingSpec()
    num_samples: int = Field(1, ge=1, le=256, description="Answers sampled per prompt.")
    temperature: float = Field(1.0, gt=0, le=10, description="Entropy is that of softmax(logits / temperature).")
    top_k_alternatives: int = Field(5, ge=0, le=50, description="Alternatives stored at each pivot.")
    detector: DetectorSpec = DetectorSpec()
    reference: bool = Field(True, description="Also score the base model, where the model is an adapter.")
    hardware: HardwareSpec = HardwareSpec()
    job: JobOptions = JobOptions()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.prompts) == bool(self.texts):
            raise ValueError("prompts: give either `prompts` (answers are sampled) or `texts` (answers are given)")
        return self
