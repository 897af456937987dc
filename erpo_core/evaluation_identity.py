"""What makes two evaluations the same measurement. Light: written by the child, compared by the API."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from erpo_core.specs.evaluate import EvaluateSpec

MODEL_PARTS = ("model", "adapter", "tokenizer", "dtype", "rendered_prompt", "stop_token_ids")
"""Parts that come with the model. Its chat template is one of them: two models render one prompt differently."""
FREE_PARTS = (*MODEL_PARTS, "seed")
"""Parts in which evaluations that are compared may differ."""


def evaluation_identity(spec: EvaluateSpec, resolved: Mapping[str, Any], verifier: str | None) -> dict[str, Any]:
    """``parts`` by name, and the ``digest`` (sha256) over all of them.

    Args:
        spec: what was asked for.
        resolved: ``model_digest``, ``adapter_digest``, ``tokenizer_digest``, ``dtype``, ``dataset_digest``,
            ``template_digest``, ``stop_token_ids``.
        verifier: :func:`erpo_core.rewards.verify.verifier_version`.
    """
    examples = [example.model_dump() for example in spec.prompt.worked_examples]
    parts = {
        "model": resolved.get("model_digest"),
        "adapter": resolved.get("adapter_digest"),
        "tokenizer": resolved.get("tokenizer_digest"),
        "dtype": resolved.get("dtype"),
        "rendered_prompt": resolved.get("template_digest"),
        "stop_token_ids": resolved.get("stop_token_ids"),
        "dataset": resolved.get("dataset_digest"),
        "num_samples": spec.num_samples,
        **spec.sampling.model_dump(),
        "template": spec.prompt.template,
        "system_prompt": spec.prompt.system_prompt,
        "instruction": spec.prompt.instruction,
        "worked_examples": _digest(examples) if examples else None,
        "truncated_boxed": spec.truncated_boxed,
        "engine": spec.engine,
        "verifier": verifier,
    }
    return {"digest": _digest(parts), "parts": parts}


def differing_parts(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Names of the ``parts`` that differ and keep two evaluations from being compared, sorted."""
    names = set(first) | set(second)
    return sorted(name for name in names - set(FREE_PARTS) if first.get(name) != second.get(name))


def model_of(parts: Mapping[str, Any]) -> str:
    """One text for one set of weights."""
    return f"{parts.get('model')}+{parts.get('adapter')}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
