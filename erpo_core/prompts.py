"""How a problem becomes a prompt, and where an answer ends."""

import hashlib
from pathlib import Path
from typing import Any

from erpo_core.specs.common import PromptSpec

BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>", "</s>")
_QWEN_SYSTEM = "You are a helpful assistant."


def prompt_messages(problem: str, spec: PromptSpec) -> list[dict[str, str]]:
    """The chat turns before the answer: system, worked examples, the problem."""
    boxed = spec.template == "qwen-boxed"
    system = spec.system_prompt or (_QWEN_SYSTEM if boxed else None)
    instruction = spec.instruction or (BOXED_INSTRUCTION if boxed else None)
    messages = [{"role": "system", "content": system}] if system else []
    for example in spec.worked_examples:
        messages.append({"role": "user", "content": _with(example.problem, instruction)})
        messages.append({"role": "assistant", "content": example.solution})
    return [*messages, {"role": "user", "content": _with(problem, instruction)}]


def prompt_text(tokenizer, problem: str, spec: PromptSpec) -> str:
    """The prompt as text, special tokens included."""
    messages = prompt_messages(problem, spec)
    if spec.template == "raw" or tokenizer.chat_template is None:
        return "\n\n".join(message["content"] for message in messages) + "\n"
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def prompt_ids(tokenizer, problem: str, spec: PromptSpec) -> list[int]:
    """The prompt as token ids; the template brings the special tokens, so none are added."""
    return tokenizer(prompt_text(tokenizer, problem, spec), add_special_tokens=False)["input_ids"]


def stop_token_ids(tokenizer, model: Any) -> list[int]:
    """Tokens that end an answer: a base model's own end of text, the chat template's end of turn, and every end that
    the model's generation config declares, as in TRL and vLLM: that of Phi-4 and GLM-4 stands nowhere else.

    Args:
        model: In memory, an adapter on it or not, or the folder that it is loaded from.
    """
    vocabulary = tokenizer.get_vocab()
    config = _generation_config(model) if isinstance(model, Path) else model.generation_config
    declared = config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    ends = {tokenizer.eos_token_id, *declared, *(vocabulary.get(name) for name in _END_TOKENS)}
    return sorted(end for end in ends if end is not None)


def end_token_id(tokenizer, spec: PromptSpec, stop_ids: list[int]) -> int:
    """The token that closes an answer: the chat template's end of turn, without a template the tokenizer's own end.

    ``stop_ids``: of :func:`stop_token_ids`.
    """
    if spec.template != "raw" and tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "{answer}"}]
        _, _, after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("{answer}")
        for token in tokenizer(after, add_special_tokens=False)["input_ids"]:
            if token in stop_ids:
                return token
    return tokenizer.eos_token_id


def template_digest(tokenizer, spec: PromptSpec) -> str:
    """sha256 of what a probe problem becomes: everything of the prompt but the problem."""
    return hashlib.sha256(prompt_text(tokenizer, "{problem}", spec).encode()).hexdigest()


def _generation_config(folder: Path) -> Any:
    """What the model of a folder has as ``generation_config``: without such a file, what its configuration says."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return GenerationConfig.from_pretrained(folder, config_file_name="config.json")


def _with(problem: str, instruction: str | None) -> str:
    return f"{problem}\n{instruction}" if instruction else problem
