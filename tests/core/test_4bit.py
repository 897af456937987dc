"""A frozen base in 4 bits: what is refused, and, where there is CUDA with bitsandbytes, a run."""

import importlib.util

import pytest
import torch
from test_trainer import train
from test_trainer_runs import metrics_of

from erpo_core.errors import RunError
from erpo_core.models import load_model
from erpo_core.specs import parse_spec
from tiny_model import make_tiny_model

BODY = {"model": "m", "dataset": "d", "load_in_4bit": True}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", hidden_size=128)


@pytest.mark.parametrize(
    ("changes", "mend"),
    [
        ({"lora": None}, "keep `lora`"),
        ({"algorithm": "sft", "lora": None}, "keep `lora`"),
        ({"use_vllm": True}, "vLLM"),
    ],
)
def test_an_order_that_cannot_be_held_in_4_bits_names_the_field(changes, mend):
    with pytest.raises(ValueError, match=f"load_in_4bit: .*{mend}"):
        parse_spec("train", BODY | changes)


def test_without_cuda_the_job_fails_and_names_the_field(tiny):
    with pytest.raises(RunError, match="load_in_4bit: this worker has not a CUDA device") as caught:
        load_model(tiny, dtype=torch.float32, load_in_4bit=True)
    assert caught.value.code == "quantization_unavailable"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("resume", [False, True])
def test_a_4_bit_base_trains_and_resumes(tiny, tmp_path, resume):
    first, second, *rest = metrics_of(train(tiny, tmp_path / "whole", load_in_4bit=True))
    assert first["erpo/progress_std"] == 0 < second["erpo/progress_std"]
    if resume:
        start = tmp_path / "whole" / "checkpoints" / "checkpoint-2"
        again = metrics_of(train(tiny, tmp_path / "rest", resume_from=start, load_in_4bit=True))
        assert [metrics["reward"] for metrics in again] == [metrics["reward"] for metrics in rest]
