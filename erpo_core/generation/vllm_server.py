"""Sampling with a vLLM server that somebody else has started, on devices of its own.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank 32

The server reads adapters from a folder that it shares with the caller. vLLM itself is not needed here.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx

from erpo_core.errors import RunError, UnknownReferenceError
from erpo_core.generation.base import Sample, Sampling, Watch, check_call
from erpo_core.generation.seeds import request_seed

_CONNECTIONS = 64
_CONNECT_SECONDS = 10
_IDLE_SECONDS = 1
"""For which an idle connection is used again. vLLM ends it after 5 (VLLM_HTTP_TIMEOUT_KEEP_ALIVE): a request that is
under way at that moment would never be answered, and a step may take as long."""
_ANSWER_SECONDS = 1800
"""The longest wait for one prompt's answers."""
_HEAR_SECONDS = 0.5
"""Between two looks at whether the answers are still wanted."""
_HOW = "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and `vllm serve MODEL --enable-lora --max-lora-rank RANK`"


def check_server(url: str | None, known: Sequence[str]) -> None:
    """Jobs reach only the servers that their operator has named.

    Raises:
        UnknownReferenceError: another one.
    """
    if url is not None and url not in known:
        raise UnknownReferenceError(
            f"{url!r} is not a vLLM server of this service",
            pointer="/vllm_server_base_url",
            mend=f"write one of {', '.join(known)}" if known else "have it named in ERPO_VLLM_SERVERS",
        )


class VLLMServer:
    """An engine behind vLLM's OpenAI interface, with one LoRA adapter at a time on its base model or none.

    Each answer has its seed, which depends on the call's and on its place; a server on a CPU may refuse seeds where a
    prompt is prefilled in parts. The key of a server that wants one is read from ``VLLM_API_KEY``.

    Args:
        base_url: ``http://host:port``.
        logps: Whether samples carry log-probabilities. Only at temperature 1: at another one a server reports, by its
            own setting, those before or after the temperature.
        timeout: Seconds to wait until the server is up.

    Raises:
        RunError: ``engine_unavailable``: nobody answers, or not as vLLM does.
    """

    def __init__(self, base_url: str, *, logps: bool = False, timeout: float = 240.0) -> None:
        self.base_url = base_url.rstrip("/")
        self._logps = logps
        self.watch: Watch | None = None
        key = os.environ.get("VLLM_API_KEY")
        self._client = httpx.Client(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {key}"} if key else None,
            timeout=httpx.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=_CONNECTIONS, keepalive_expiry=_IDLE_SECONDS),
            trust_env=False,
        )
        self._threads = ThreadPoolExecutor(_CONNECTIONS, "vllm-server")
        card = self._wait_until_up(timeout)
        self._base: str = card["id"]
        self._model = self._base
        self.max_model_len: int = card["max_model_len"]

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
            ValueError: as there, or a prompt leaves no room for its answer in the server's ``max_model_len``.
            RunError: ``engine_unavailable``: the server does not answer, refuses, or cuts answers short.
        """
        check_call(prompts, n, max_new_tokens)
        if max(map(len, prompts), default=0) + max_new_tokens > self.max_model_len:
            raise ValueError(
                f"generate: prompt and max_new_tokens exceed the server's max_model_len ({self.max_model_len})"
            )
        greedy = temperature == 0
        scored = self._logps and temperature == 1 and Sampling(temperature, top_p, top_k).is_whole
        body = {
            "n": 1 if greedy else n,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": max_new_tokens,
            "stop_token_ids": sorted(set(stop_ids)),
            "ignore_eos": True,  # what ends an answer is stop_ids alone
            "return_token_ids": True,
            "logprobs": 0 if scored else None,
        }
        seeds = [None if greedy else request_seed(seed, index) for index in range(len(prompts))]
        bodies = [body | {"prompt": list(prompt), "seed": own} for prompt, own in zip(prompts, seeds, strict=True)]
        groups = []
        for answer in self._complete_all(bodies):
            group = _samples(answer, frozenset(stop_ids))
            self._check_lengths(group, max_new_tokens)
            groups.append(group * (n // len(group)))
            self._tell(sum(len(sample.token_ids) for sample in groups[-1]), n)
        return groups

    def generate_each(self, calls: Iterable[Mapping[str, Any]]) -> Iterator[list[list[Sample]]]:
        """One call after the other."""
        return (self.generate(**call) for call in calls)

    def prompt_logps(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities, at temperature 1, of every token but the first under the adapter in use."""
        answer = self._complete({"prompt": list(token_ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0})
        found = answer["choices"][0]["prompt_logprobs"]
        return [step[str(token)]["logprob"] for token, step in zip(token_ids[1:], found[1:], strict=True)]

    def load_adapter(self, folder: Path, name: str) -> None:
        """Have the server read the adapter in ``folder``. vLLM's caches know an adapter by its name: never use one
        twice.

        Raises:
            RunError: ``engine_unavailable``: the server takes no adapters; ``adapter_unsupported``: not this one.
        """
        found = self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())})
        if found.is_success:
            return
        if _is_unknown_route(found):
            raise RunError(
                f"the vLLM server at {self.base_url} takes no adapters while it runs: {_HOW}", code="engine_unavailable"
            )
        raise RunError(
            f"the vLLM server at {self.base_url} cannot load the adapter in {folder}: {_reason(found)}. It must be "
            f"started with --enable-lora and a --max-lora-rank of at least the adapter's rank, and see that folder "
            "under the same path",
            code="adapter_unsupported",
        )

    def use_adapter(self, name: str | None) -> None:
        """Answers come from the base with this adapter on, from now on; None: from the base."""
        self._model = self._base if name is None else name

    def unload_adapter(self, name: str) -> None:
        """Let the server forget an adapter; one that it does not know is no error."""
        self._post("/v1/unload_lora_adapter", {"lora_name": name})

    def close(self) -> None:
        """End the connections."""
        self._threads.shutdown()
        self._client.close()

    def _complete_all(self, bodies: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """The answers in order; whoever watches is heard while they are waited for."""
        waiting = [self._threads.submit(self._complete, body) for body in bodies]
        try:
            for future in waiting:
                while not wait([future], timeout=_HEAR_SECONDS).done:
                    self._tell(0, 0)
                yield future.result()
        finally:
            for future in waiting:
                future.cancel()

    def _check_lengths(self, group: Sequence[Sample], max_new_tokens: int) -> None:
        cut = [len(sample.token_ids) for sample in group if not sample.finished]
        if min(cut, default=max_new_tokens) < max_new_tokens:
            raise RunError(
                f"the vLLM server at {self.base_url} cut an answer after {min(cut)} of {max_new_tokens} tokens: start "
                "it without a `max_new_tokens` of its own (--override-generation-config)",
                code="engine_unavailable",
            )

    def _tell(self, tokens: int, answers: int) -> None:
        if self.watch is not None:
            self.watch(tokens, answers)

    def _complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        found = self._post("/v1/completions", {"model": self._model, **body})
        if not found.is_success:
            raise RunError(f"the vLLM server at {self.base_url} refuses: {_reason(found)}", code="engine_unavailable")
        return found.json()

    def _post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        try:
            return self._client.post(path, json=body)
        except httpx.TransportError as error:
            raise RunError(
                f"the vLLM server at {self.base_url} does not answer: {error!r}", code="engine_unavailable"
            ) from error

    def _wait_until_up(self, timeout: float) -> dict[str, Any]:
        """The card of the base model."""
        end = time.monotonic() + timeout
        while True:
            try:
                found = self._client.get("/v1/models")
            except httpx.TransportError as error:
                reason = repr(error)
            else:
                cards = _base_cards(found)
                if cards:
                    return cards[0]
                reason = _reason(found)
                if found.status_code < 500:
                    break
            if time.monotonic() > end:
                break
            time.sleep(1)
        raise RunError(f"no vLLM server answers at {self.base_url}: {reason}", code="engine_unavailable")


def _base_cards(found: httpx.Response) -> list[dict[str, Any]]:
    try:
        cards = found.json()["data"] if found.is_success else []
        return [card for card in cards if card["parent"] is None and card["max_model_len"]]
    except (ValueError, KeyError, TypeError):
        return []


def _samples(answer: dict[str, Any], ends: frozenset[int]) -> list[Sample]:
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    return [
        Sample(
            choice["token_ids"],
            choice["token_ids"][-1] in ends,
            choice["logprobs"]["token_logprobs"] if choice["logprobs"] else None,
        )
        for choice in choices
    ]


def _is_unknown_route(found: httpx.Response) -> bool:
    return found.status_code in (404, 405) and "error" not in found.text


def _reason(found: httpx.Response) -> str:
    try:
        body = found.json()
        return str(body["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{found.status_code} {found.text[:500]}"
