"""Weights in shards, one on each rank (FSDP2, or DeepSpeed's ZeRO at stage 3): who needs them whole, and when.

The policy is sharded when training begins. From then on a layer gathers its weights while it computes; what reaches
past the model's own ``forward`` (the body alone, the head's weight) does so through :func:`inside`. On weights that are
whole every function here does the plain thing.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from erpo_core.trainer import zero

_INSIDE = "_called_inside"


class ShardedWeights:
    """A mixin before transformers' Trainer: FSDP2 on GPUs and on CPUs, in the dtype that the weights are stored in."""

    accelerator: Accelerator
    _reference: Any

    def create_accelerator_and_postprocess(self) -> None:
        """transformers', which calls it while it is constructed.

        Raises:
            ValueError: an option of FSDP that would change what is trained or saved, by name.
        """
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        wanted = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        if wanted and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate shards on devices only: on CPUs it would train whole copies and not say so.
            PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled:
            _check(state.fsdp_plugin)
            # accelerate's would round the log-probabilities that leave the model; autocast is as without shards.
            state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
            # Gradients of a micro-batch are reduced at once: whole ones, kept until the last, would fill the memory.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True

    def _prepare_for_training(self, *args, **kwargs):
        if self.is_fsdp_enabled:
            _name_layers(self.accelerator.state.fsdp_plugin, self.model)
        prepared = super()._prepare_for_training(*args, **kwargs)
        if isinstance(self.model, FSDPModule):
            self._reference.shard(lambda model: fsdp2_prepare_model(self.accelerator, model))
        return prepared


def is_sharded(model: Any) -> bool:
    """Whether each rank holds a part of every weight."""
    return isinstance(model, FSDPModule) or zero.holds_shards(model)


def goes_in_step(model: Any) -> bool:
    """Whether the ranks must score the same number of times, since they share weights or gradients as they go."""
    return isinstance(model, FSDPModule) or zero.engine_of(model) is not None


def inside(model: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` where ``model``'s embeddings, last norm and head are whole and its layers may be called.

    All ranks must call it. What is returned must hold its tensors in tuples: gradients start from them.
    """
    engine = zero.engine_of(model)
    if engine is not None:
        return zero.call(engine, function, *arguments)
    if not is_sharded(model):
        return function(*arguments)
    if not hasattr(model, _INSIDE):
        setattr(model, _INSIDE, _call)
        register_fsdp_forward_method(model, _INSIDE)
    return getattr(model, _INSIDE)(function, *arguments)


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Every weight whole on every rank inside, for calls that the ranks do not make in step. All ranks must enter."""
    if not is_sharded(model):
        yield
        return
    engine = zero.engine_of(model)
    if engine is not None:
        with zero.gathered(engine):
            yield
        return
    inside(model, tuple)  # the root has to be called before its parts
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    kept = [_reshards_after_forward(part) for part in parts]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part, reshards in zip(parts, kept, strict=True):
            part.reshard()
            part.set_reshard_after_forward(reshards, recurse=False)


def reshard(model: Any) -> None:
    """Leave each rank with its own part alone: between steps, what was gathered last may still be whole."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor without shards and without its graph. All ranks must call it."""
    if hasattr(tensor, "ds_tensor"):
        return zero.whole(tensor)
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape without shards."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradients(model: Any) -> dict[str, Tensor]:
    """{name: this rank's part} before an optimizer step."""
    engine = zero.engine_of(model)
    if engine is not None:
        return zero.gradients(engine)
    return {name: local(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def whole_weights(model: Any, *, keep: bool) -> dict[str, Tensor]:
    """The weights that a checkpoint has, whole, on the CPU: of an adapter only its own. All ranks must call it; where
    ``keep`` is false nothing is returned."""
    adapters = set(getattr(model, "peft_config", ()))
    found, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and (not adapters or adapters & set(name.split("."))):
            seen.add(id(tensor))
            full = whole(tensor)
            if keep:
                found[name] = full.cpu()
    return found


def whole_state(optimizer: Any, *, keep: bool) -> dict[str, Any]:
    """An optimizer's state with whole tensors, on the CPU. All ranks must call it; where ``keep`` is false its tensors
    are empty."""
    if isinstance(optimizer, zero.ZeroOptimizer):
        return optimizer.state_dict(keep=keep)
    return tree_map_only(Tensor, lambda tensor: zero.on_cpu(whole(tensor), keep), optimizer.state_dict())


def load_whole_state(model: Any, optimizer: Any, state: dict[str, Any]) -> None:
    """What :func:`whole_state` gave, the same on every rank, into an optimizer whose own state is in parts."""
    if zero.engine_of(model) is not None:
        optimizer.load_state_dict(state)
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state["state"].items():
        state["state"][index] = {name: _sharded_as(parameters[index], value) for name, value in values.items()}
    optimizer.load_state_dict(state)


def counts(parameters: Iterable[Tensor], count: Callable[[Tensor], int], model: Any) -> list[int]:
    """``count`` of each whole parameter of a model, where that of a whole is the sum of its parts'. All ranks must
    call it."""
    if not isinstance(model, FSDPModule):
        return [count(whole(parameter)) for parameter in parameters]
    wide = torch.tensor([count(local(p)) for p in parameters], dtype=torch.int64, device=model.device)
    dist.all_reduce(wide)
    return wide.tolist()


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _sharded_as(parameter: Tensor, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None)


def _reshards_after_forward(part: FSDPModule) -> bool:
    groups = part._get_fsdp_state()._fsdp_param_groups  # there is no public way to read it
    return any(group.post_forward_mesh_info is not None for group in groups)


def _name_layers(plugin: FullyShardedDataParallelPlugin, model: Any) -> None:
    """Those that the model names and has: one of a family that also reads images names the layers of the others, which
    accelerate would not find."""
    if plugin.transformer_cls_names_to_wrap is None:
        present = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(present.intersection(model._no_split_modules or ()))


def _check(plugin: FullyShardedDataParallelPlugin) -> None:
    if plugin.fsdp_version != 2:
        raise ValueError("fsdp_version: FSDP1 is not supported; write 2")
    for name in ("activation_checkpointing", "cpu_ram_efficient_loading"):
        if getattr(plugin, name):
            raise ValueError(f"fsdp_{name}: not supported by ERPO Lab; write false")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError("fsdp_offload_params: not supported by ERPO Lab; write false")
