"""The body of `POST /analyze/entropy`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from erpo_core.specs.common import (
    DatasetRef,
    HardwareSpec,
    JobOptions,
    ModelRef,
    OneDevice,
    PromptSpec,
    SamplingSpec,
    Spec,
    Text,
)

_TURN_MARKERS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>")
_MAX_SEQUENCES = 10_000
_MAX_TOKEN_CHARS = 1000
UNKNOWN_LOGPROB = -9999.0
"""What engines give for a token that is not among the likeliest."""

Token = Annotated[str, Field(max_length=_MAX_TOKEN_CHARS)]


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


class AnswerSource(Spec):
    """Answers that a run of this service has stored: of an evaluation, or rollouts of a training."""

    run: str = Field(pattern=r"^run_[0-9a-f]{32}$", description="A run that has sampled answers.")
    step: int | None = Field(None, ge=0, le=2**31 - 1, description="Only answers of this training step.")
    limit: int = Field(200, ge=1, le=_MAX_SEQUENCES, description="Answers at most, in the order they were stored.")


class LikelyToken(Spec):
    """A token that an engine lists at a place, with its log-probability."""

    token: Token
    logprob: float = Field(le=1e-3, description="Nats.")
    bytes: tuple[Annotated[int, Field(ge=0, le=255)], ...] | None = Field(
        None, max_length=_MAX_TOKEN_CHARS, description="Its UTF-8, where a character has several tokens."
    )

    @property
    def utf8(self) -> bytes:
        """Its bytes: perhaps a part of a character."""
        return self.token.encode() if self.bytes is None else bytes(self.bytes)


class GivenToken(LikelyToken):
    """A written token. ``logprob`` of -9999 or less: not given, it was not among the likeliest."""

    top_logprobs: tuple[LikelyToken, ...] = Field(
        min_length=1, max_length=1000, description="The likeliest tokens here, the written one among them if it is one."
    )


class GivenText(Spec):
    """An answer as an engine gave it: ``choices[0].logprobs.content`` of a chat completion, and perhaps its prompt."""

    content: tuple[GivenToken, ...] = Field(min_length=1)
    prompt: str = Field("", max_length=200_000)


class GivenLogprobs(Spec):
    """Top-k log-probabilities in place of a model's pass: entropies are known to lie in intervals, never exactly."""

    vocab_size: int = Field(ge=1, le=10_000_000, description="Tokens of the engine's vocabulary.")
    texts: tuple[GivenText, ...] = Field(min_length=1, max_length=_MAX_SEQUENCES)


class EntropySpec(Spec):
    """Per-token entropy by one teacher-forced pass: of given texts, of stored answers, or of sampled ones.

    Exactly one of ``prompts``, ``texts``, ``dataset``, ``source`` and ``logprobs`` says of what.
    """

    model: ModelRef
    prompts: tuple[Text, ...] = Field((), max_length=_MAX_SEQUENCES, description="Problems; answers are sampled.")
    texts: tuple[TextPair, ...] = Field((), max_length=_MAX_SEQUENCES, description="Given answers; nothing is sampled.")
    dataset: DatasetRef | None = Field(None, description="A benchmark; answers are sampled to its problems.")
    limit: int = Field(100, ge=1, le=_MAX_SEQUENCES, description="`dataset`: problems at most, by order of the file.")
    source: AnswerSource | None = Field(
        None, description="Stored answers, under the prompt of the run that sampled them; `prompt` is not used."
    )
    logprobs: GivenLogprobs | None = Field(
        None,
        description="Raw top-k log-probabilities that another engine gave. Nothing is scored: `model` and "
        "`temperature` only say what they are of, and each token gets a certified interval (`exact` is false).",
    )
    prompt: PromptSpec = PromptSpec()
    sampling: SamplingSpec = SamplingSpec()
    num_samples: int = Field(1, ge=1, le=256, description="Answers sampled per prompt.")
    temperature: float = Field(1.0, gt=0, le=10, description="Entropy is that of softmax(logits / temperature).")
    top_k_alternatives: int = Field(5, ge=0, le=50, description="Alternatives stored at each pivot.")
    detector: DetectorSpec = DetectorSpec()
    batch_size: int = Field(32, ge=1, le=4096, description="Sequences decoded together.")
    reference: bool = Field(True, description="Also score the base model, where the model is an adapter.")
    hardware: OneDevice = HardwareSpec()
    job: JobOptions = JobOptions()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(map(bool, (self.prompts, self.texts, self.dataset, self.source, self.logprobs))) != 1:
            raise ValueError(
                "prompts: give either `prompts` or `dataset` (answers are sampled), or `texts` or `source` (nothing "
                "is), or `logprobs`"
            )
        for index, pair in enumerate(self.texts):
            found = next((marker for marker in _TURN_MARKERS if marker in pair.response), None)
            if found and self.prompt.template != "raw":
                raise ValueError(
                    f"texts/{index}/response: it holds the turn marker {found}, but the template makes the turns; give "
                    "the answer alone, or use template `raw`"
                )
        return self
