"""What the processes of one run tell each other. With one process every function gives back what it was given."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from erpo_core.advantages import ERPOSignals
from erpo_core.generation.base import Engine, Sample, Watch
from erpo_core.job import LeftEarlyError
from erpo_core.trainer import zero
from erpo_core.trainer.sharding import is_sharded
from erpo_core.trainer.totals import Totals


def gather_rows(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Rows (B,) or (B, T) of all ranks, rank by rank; T becomes the longest of all ranks, padded with 0."""
    if accelerator.num_processes == 1:
        return values
    if values.dtype == torch.bool:  # accelerate's padding turns it into int64, on the ranks that pad
        return gather_rows(accelerator, values.to(torch.uint8)).bool()
    if values.ndim > 1:
        values = accelerator.pad_across_processes(values, dim=1)
    return accelerator.gather(values.contiguous())


def local_rows(accelerator: Accelerator, values: Tensor, like: Tensor) -> Tensor:
    """This rank's rows of gathered ones, as many and as wide as ``like``."""
    start = accelerator.process_index * len(like)
    rows = values[start : start + len(like)]
    return rows[:, : like.shape[1]] if values.ndim > 1 else rows


def local_signals(accelerator: Accelerator, signals: ERPOSignals, mask: Tensor) -> ERPOSignals:
    """This rank's rows of every term."""
    return replace(signals, **{name: local_rows(accelerator, v, mask) for name, v in vars(signals).items()})


def local_slice(accelerator: Accelerator, count: int) -> slice:
    """Where this rank's rows lie among all, each rank having ``count``."""
    return slice(accelerator.process_index * count, (accelerator.process_index + 1) * count)


def gather_list(accelerator: Accelerator, values: list) -> list:
    """The picklable things of all ranks, rank by rank."""
    return values if accelerator.num_processes == 1 else gather_object(values)


def sum_gradients(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """The gradients of all ranks, added up in place: the loss's weights are those of the whole step already.

    The model is called below DDP's wrapper, which therefore reduces nothing by itself; FSDP2 and ZeRO give the ranks'
    mean. Where no answer reached a parameter its gradient is 0, not absent: the optimizer's moments go on.
    """
    engine = zero.engine_of(model)
    if engine is not None:
        zero.sum_gradients(engine)
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if is_sharded(model):
        for parameter in parameters:
            parameter.grad *= accelerator.num_processes
    elif accelerator.num_processes > 1:
        _all_reduce([parameter.grad for parameter in parameters])


def _all_reduce(gradients: list[Tensor]) -> None:
    for dtype in {gradient.dtype for gradient in gradients}:
        alike = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = torch.cat([gradient.flatten() for gradient in alike])
        dist.all_reduce(flat)
        for gradient, total in zip(alike, flat.split([g.numel() for g in alike]), strict=True):
            gradient.copy_(total.view_as(gradient))


def gather_totals(accelerator: Accelerator, totals: Totals) -> Totals:
    """The numbers of all ranks as one."""
    if accelerator.num_processes == 1:
        return totals
    whole = Totals()
    for state in gather_object([totals.state()]):
        whole.merge(state)
    return whole


def sampled_together(
    accelerator: Accelerator, engine: Engine, watch: Watch | None, prompts: list[list[int]], **call: Any
) -> list[list[Sample]]:
    """This rank's answers, as :meth:`erpo_core.generation.base.Engine.generate` gives them.

    Raises:
        LeftEarlyError: on all ranks, where the watch of one of them raised it.
    """
    engine.watch, answers = watch, None
    with suppress(LeftEarlyError):
        answers = engine.generate(prompts, **call)
    if total_of(accelerator, [float(answers is None)])[0]:
        raise LeftEarlyError
    return answers


def mean_of(accelerator: Accelerator, value: float) -> float:
    """The ranks' mean."""
    return total_of(accelerator, [value])[0] / accelerator.num_processes


def total_of(accelerator: Accelerator, values: list[float]) -> list[float]:
    """The ranks' sums, in float64."""
    if accelerator.num_processes == 1:
        return values
    wide: Any = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    return accelerator.reduce(wide, "sum").tolist()
