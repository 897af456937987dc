"""No two answers to a prompt are drawn with the same seed, on whichever ranks and in whichever round they are asked."""

from types import SimpleNamespace

import pytest

from erpo_core.generation.seeds import request_seed
from erpo_core.generation.vllm_server import VLLMServer
from erpo_core.trainer.rollouts import SampledAnswers

SAME, OTHER = [1, 2, 3], [4, 5]


class Recording(VLLMServer):
    """Keeps what it would send."""

    def __init__(self) -> None:
        self.max_model_len, self._logps, self.watch = 64, False, None
        self.sent: list[tuple[tuple[int, ...], int]] = []

    def _complete_all(self, bodies):
        # vLLM gives the j-th answer of a request the request's seed + j (v1/engine/parallel_sampling.py).
        self.sent += [(tuple(body["prompt"]), body["seed"] + j) for body in bodies for j in range(body["n"])]
        return iter(())


def generation_seed(seed: int, step: int, rank: int, again: int) -> int:
    trainer = SimpleNamespace(
        args=SimpleNamespace(seed=seed),
        state=SimpleNamespace(global_step=step),
        accelerator=SimpleNamespace(process_index=rank),
        _resample_round=again,
    )
    return SampledAnswers._generation_seed(trainer)


def test_ranks_rounds_and_steps_never_draw_a_prompts_answers_alike():
    server = Recording()
    for step in range(3):
        for rank in range(4):
            for again in range(3):
                seed = generation_seed(42, step, rank, again)
                server.generate([SAME, SAME, OTHER], n=8, max_new_tokens=8, stop_ids=[0], seed=seed)
    assert len(server.sent) == len(set(server.sent)) == 3 * 4 * 3 * 3 * 8
    assert len({seed for _, seed in server.sent}) == len(server.sent)
    assert max(seed for _, seed in server.sent) < 2**62


@pytest.mark.parametrize("changed", range(4))
def test_a_generations_seed_is_that_of_seed_step_rank_and_round_alone(changed):
    parts = [42, 7, 1, 2]
    first = generation_seed(*parts)
    assert generation_seed(*parts) == first
    parts[changed] += 1
    assert generation_seed(*parts) != first


def test_neighbouring_calls_have_no_seed_in_common():
    seeds = [request_seed(call, place) + j for call in range(50) for place in range(20) for j in range(8)]
    assert len(set(seeds)) == len(seeds)
