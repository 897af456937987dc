"""DeepSpeed's ZeRO below transformers' loop: gradients and optimizer state in parts (stage 2), weights too (stage 3).

accelerate's integration steps inside ``backward``, where a gradient that is not finite can no longer be stopped, and
casts a frozen base. Here a launch's configuration is taken from accelerate, DeepSpeed's engine is started by ourselves,
and the loop goes on as without it: backward, a look at the gradients, clipping, the step.
"""

import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from torch import Tensor

_ENGINE = "_zero_engine"
"""Under which a model keeps its engine; stage 3 has one for a reference of its own as well."""
_LAUNCHED: list[dict[str, Any]] = []
"""The configuration that this process was launched with; accelerate reads it once from the environment."""
_BUCKET = 50_000_000
"""Elements whose gradients are reduced together; DeepSpeed's 5e8 would take 2 GB of buffer."""


class ZeroParts:
    """A mixin before transformers' Trainer: what ``accelerate launch`` says of DeepSpeed, done with plain processes."""

    args: Any
    """Transformers', after :func:`take_configuration`."""
    optimizer: Any
    zero_config: dict[str, Any] | None
    """DeepSpeed's ``zero_optimization``, where the launch asks for it."""

    def create_accelerator_and_postprocess(self) -> None:
        """transformers', which calls it while it is constructed."""
        if not torch.cuda.is_available():
            # accelerate imports DeepSpeed wherever it is installed, which then warns that there is no GPU.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        self.zero_config = self.args.zero_config
        super().create_accelerator_and_postprocess()
        if self.accelerator.num_processes == 1:
            self.zero_config = None
        if self.zero_config is not None:
            # Its engine reduces each micro-batch's gradients at once, and knows no `no_sync`.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True

    def _wrap_model(self, model, training: bool = True, dataloader=None):
        if self.zero_config is None or not training or engine_of(self.model) is not None:
            return super()._wrap_model(model, training=training, dataloader=dataloader)
        groups = [dict(group) for group in self.optimizer.param_groups]
        engine = _start(self.model, self.zero_config, self.optimizer)
        self.optimizer = ZeroOptimizer(engine.optimizer, groups)
        if self.zero_config["stage"] == 3:
            self._reference.shard(lambda model: _start(model, self.zero_config, None).module)
        return engine

    def _clip_grad_norm(self, model):
        zero = engine_of(self.model)
        return super()._clip_grad_norm(model) if zero is None else clip_gradients(zero, self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        zero = engine_of(self.model)
        if zero is not None and grad_norm is None:
            return clip_gradients(zero, float("inf")).item()
        return super()._get_grad_norm(model, grad_norm)


class ZeroOptimizer(torch.optim.Optimizer):
    """DeepSpeed's optimizer as torch's: its state is whole in ``state_dict``, and the same as without ZeRO."""

    def __init__(self, zero: Any, groups: list[dict[str, Any]]) -> None:
        """
        Args:
            zero: DeepSpeed's optimizer.
            groups: Those that it was made of, empty ones too, which it drops.
        """
        self.zero = zero
        self._parameters = [group["params"] for group in groups]
        kept = iter(zero.optimizer.param_groups)
        self._groups = [next(kept) if group["params"] else group for group in groups]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """With their learning rates; the parameters in them are DeepSpeed's flat ones."""
        return self._groups

    @property
    def state(self) -> dict[Any, Any]:
        """Of DeepSpeed's flat parameters."""
        return self.zero.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:
        """The optimizer's own."""
        return self.zero.optimizer.defaults

    def step(self, closure=None) -> None:
        """Gradients that are not finite are dropped, and nothing moves."""
        self.zero.step()
        self.zero.zero_grad(set_to_none=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        self.zero.zero_grad(set_to_none=set_to_none)

    def state_dict(self, *, keep: bool = True) -> dict[str, Any]:
        """torch's, of whole parameters, on the CPU. All ranks must call it; where ``keep`` is false the tensors of the
        state are empty."""
        from deepspeed.utils import safe_get_full_optimizer_state

        _link_state(self.zero)
        state, groups, index = {}, [], 0
        scalars, names = _kinds_of_state(self.state)
        for group, parameters in zip(self.param_groups, self._parameters, strict=True):
            numbers = range(index, index + len(parameters))
            groups.append({name: value for name, value in group.items() if name != "params"} | {"params": [*numbers]})
            for number, parameter in zip(numbers, parameters, strict=True):
                found = {name: on_cpu(safe_get_full_optimizer_state(parameter, name), keep) for name in names}
                if scalars or found:
                    state[number] = {name: value.cpu() for name, value in scalars.items()} | found
            index += len(parameters)
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave, or an optimizer without ZeRO, the same on every rank."""
        for group, loaded in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in loaded.items() if name != "params"})
        if not state_dict["state"]:
            return
        scalars, names = _kinds_of_state(state_dict["state"])
        # As torch's: a fused step counts on the device, where it would read a place that is none of its own.
        on_device = any(group.get("fused") or group.get("capturable") for group in self.param_groups)
        for flat in _flat_parameters(self.zero):
            like = {name: torch.zeros_like(flat, requires_grad=False) for name in names}
            own = {name: value.to(flat.device if on_device else "cpu", copy=True) for name, value in scalars.items()}
            self.state[flat] = own | like
        _link_state(self.zero)
        parameters = [parameter for group in self._parameters for parameter in group]
        for number, parameter in enumerate(parameters):
            for name in names:
                _set_state(parameter, name, state_dict["state"][number][name])


def take_configuration(args: Any) -> None:
    """Set ``zero_config`` of ``args`` (transformers' arguments): DeepSpeed's ``zero_optimization`` of theirs or of the
    launch, or None. Nothing of it is left to accelerate and transformers, which from then on see plain processes.

    Raises:
        ValueError: a setting that is not supported, by name.
    """
    plugin, args.deepspeed_plugin = args.deepspeed_plugin, None
    if plugin is None:
        args.zero_config = _LAUNCHED[0] if _LAUNCHED else None
        return
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    args.zero_config = _checked(plugin.deepspeed_config)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        _LAUNCHED.append(args.zero_config)
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
    state = PartialState()
    if state.distributed_type == DistributedType.DEEPSPEED:
        on_gpu = state.device.type == "cuda"
        state.distributed_type = DistributedType.MULTI_GPU if on_gpu else DistributedType.MULTI_CPU


def engine_of(model: Any) -> Any | None:
    """DeepSpeed's engine of a model, where it has one."""
    return vars(model).get(_ENGINE)  # not by getattr: an adapter asks its base model


def holds_shards(model: Any) -> bool:
    """Whether each rank holds a part of every weight: stage 3."""
    engine = engine_of(model)
    return engine is not None and engine.zero_optimization_partition_weights()


def call(engine: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` as the forward of an engine's model, which its hooks go around."""
    model = engine.module
    kept = vars(model).get("forward")
    model.forward = function
    try:
        return engine(*arguments)
    finally:
        del model.forward
        if kept is not None:
            model.forward = kept


@contextmanager
def gathered(engine: Any) -> Iterator[None]:
    """Every weight whole on every rank inside, for calls that the ranks do not make in step. All ranks must enter."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        # Its hooks talk to the other ranks in every forward, one of them outside of DeepSpeed's own list of hooks.
        kept = [(module, module._forward_pre_hooks, module._forward_hooks) for module in engine.module.modules()]
        for module, *_ in kept:
            module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
        try:
            yield
        finally:
            for module, before, after in kept:
                module._forward_pre_hooks, module._forward_hooks = before, after


def whole(parameter: Tensor) -> Tensor:
    """A copy of a parameter without shards. All ranks must call it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def on_cpu(tensor: Tensor, keep: bool) -> Tensor:
    """The tensor, or an empty one: of what is whole on every rank for a moment, one alone keeps it all."""
    return tensor.cpu() if keep else tensor.new_empty(0, device="cpu")


def sum_gradients(engine: Any) -> None:
    """Of all ranks, in place; DeepSpeed gives their mean."""
    for part in gradients(engine).values():
        part *= dist.get_world_size()


def gradients(engine: Any) -> dict[str, Tensor]:
    """{name: this rank's part}, of all micro-batches together, before the step."""
    zero = engine.optimizer
    owned = zero.fp16_groups if hasattr(zero, "fp16_groups") else zero.params_in_partition
    if any(zero.averaged_gradients.get(index) is None for index in range(len(owned))):
        zero.finalize_gradient_accumulation_boundary()
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    return {
        names[id(parameter)]: part
        for index, parameters in enumerate(owned)
        # At stage 2 a last part may follow that fills up the partition.
        for parameter, part in zip(parameters, zero.averaged_gradients[index], strict=False)
    }


def clip_gradients(engine: Any, max_norm: float) -> Tensor:
    """The norm of all gradients, which are scaled down to ``max_norm`` in place. All ranks must call it."""
    parts = list(gradients(engine).values())
    squares = torch.stack([part.float().square().sum() for part in parts] or [torch.zeros((), device=engine.device)])
    total = squares.sum()
    dist.all_reduce(total)
    norm = total.sqrt()
    for part in parts:
        part *= torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return norm


def _start(model: Any, config: dict[str, Any], optimizer: Any) -> Any:
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # The trainer says where autocast is on; DeepSpeed would switch off what is not in its configuration.
    deepspeed.runtime.engine.autocast_if_enabled = nullcontext
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if model.device.type == "cpu":
        # It would be compiled when it is first used; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if config["stage"] == 3 and len({parameter.dtype for parameter in model.parameters()}) > 1:
        # Of what it leaves whole it gathers all in the dtype of the first (deepspeedai/DeepSpeed#8072).
        config = config | {"stage3_param_persistence_threshold": 0}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # the loop says when an optimizer step is due
        "gradient_clipping": 0.0,  # the loop clips; left out it would be 1
        "zero_allow_untested_optimizer": True,
        "zero_optimization": config,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    object.__setattr__(model, _ENGINE, engine)  # not as a part of the model, which it holds
    return engine


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise ValueError(
                f"{name}: not supported in DeepSpeed's configuration; the trainer's own decides, leave it out"
            )
    if config.get("fp16", {}).get("enabled") is True:
        raise ValueError("fp16: not supported; use the trainer's bf16")
    zero = {name: value for name, value in config["zero_optimization"].items() if value not in ("auto", None)}
    if zero.get("stage") not in (2, 3):
        raise ValueError(f"zero_stage: {zero.get('stage')!r} is not supported; write 2 or 3")
    for name in ("offload_optimizer", "offload_param"):
        if (zero.pop(name, None) or {}).get("device", "none") != "none":
            raise ValueError(f"{name}: not supported; write device none, or use more devices")
    zero.setdefault("reduce_bucket_size", _BUCKET)
    if zero["stage"] == 3:
        zero["overlap_comm"] = False  # not with gradients that the loop accumulates
    return zero


def _kinds_of_state(state: dict[Any, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The scalars of an optimizer's state, which all its parameters share, and the names of its tensors."""
    first = next(iter(state.values()), {})
    scalars = {name: value for name, value in first.items() if value.ndim == 0}
    return scalars, [name for name in first if name not in scalars]


def _flat_parameters(zero: Any) -> list[Tensor]:
    stage_3 = hasattr(zero, "fp32_partitioned_groups_flat")
    return zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups


def _link_state(zero: Any) -> None:
    """Tell stage 2's parameters where their state lies: DeepSpeed does so after the first group's step, when the others
    have none yet."""
    if hasattr(zero, "_hp_optimizer_states_linked") and zero.optimizer.state:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _set_state(parameter: Any, name: str, value: Tensor) -> None:
    """This rank's part of one tensor of an optimizer's state, of which ``value`` is the whole."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    value = value.to(parameter.device)
    if not hasattr(parameter, "ds_tensor"):
        safe_set_full_optimizer_state(parameter, value, name)
        return
    size = parameter.ds_tensor.numel()  # of all ranks alike: the last one's is filled up
    padded = torch.nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    safe_set_local_optimizer_state(parameter, padded.narrow(0, size * dist.get_rank(), size), name)
