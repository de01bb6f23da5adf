"""A model that several processes train together: replicated (DDP) or sharded (FSDP2).

Under FSDP2 every weight, its average and its optimiser state is a DTensor, of which each process holds a shard. Tensors
are gathered one by one when they are written, so files do not depend on `parallel` or on the number of processes.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..files.tensor_file import writing_order
from ..training_config import TrainingConfig
from .ranks import Ranks

_FSDP2 = "torch.distributed.fsdp", "torch.distributed._composable.fsdp"
"""The torch modules that contain FSDP2, the newer first."""


def distributed(model: Backbone, trained: Collection[str], ranks: Ranks, config: TrainingConfig) -> nn.Module:
    """The module to call in place of the model in training, so that every process gets the mean of all gradients.

    Args:
        model: in its final dtypes and with requires_grad set, on the process's device, or on the device "meta" with its
            `read_part`. Under "fsdp" its parameters are replaced by DTensors in place, block by block, and blocks on
            "meta" are read first: no process holds more than its shards and one block.
        trained: names of the parameters that train.
        ranks: the processes, more than one.
        config: `parallel` says how; "auto", which a run's plan decides, counts as "ddp" here. Under precision "bf16"
            FSDP2 gathers weights in bfloat16; gradients are always summed in float32.
    """
    # Every process must have a gradient for every parameter, whatever the lengths of its captions.
    model.always_pad = True
    if config.parallel != "fsdp":
        _read(model, model, "")
        network = _replicated(model.to(ranks.device), trained)
    else:
        network = _sharded(model, ranks, config.precision)
    model.read_part = None
    return network


def _read(model: Backbone, part: nn.Module, name: str) -> None:
    """Read the weights of a module that are still on the device "meta"."""
    if model.read_part:
        model.read_part(part, name)


def check_shards(config: TrainingConfig, device: torch.device) -> None:
    """Refuse settings that do not work with a sharded model.

    Args:
        config: of the training; if `parallel` is "auto", the sentence says why the model is sharded.
        device: of a process.

    Raises:
        ValueError: for compiling, for 8-bit states, and if this build of torch has no FSDP2 for the device.
    """
    why = "" if config.parallel == "fsdp" else 'The whole model does not fit in one process, so "auto" chose "fsdp". '
    if config.compile:
        raise ValueError(f'{why}compile = true does not work with parallel = "fsdp": remove one of them.')
    if config.optimiser_bits == 8:
        raise ValueError(
            f'{why}parallel = "fsdp" shards optimiser states, which does not work in 8 bits: set optimiser_bits = 32, '
            'or choose parallel = "ddp".'
        )
    _fsdp2()
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise ValueError("FSDP2 of this torch works on GPUs only: choose parallel = 'ddp', or install a newer torch.")


def _replicated(model: Backbone, trained: Collection[str]) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    # The head's convolutions work in channels-last order, which costs a copy of their small gradients.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    frozen = [name for name, _ in model.named_parameters() if name not in trained]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def _sharded(model: Backbone, ranks: Ranks, precision: str) -> nn.Module:
    fully_shard, policy_of = _fsdp2()
    from torch.distributed.device_mesh import init_device_mesh

    # Inputs stay as they are: noise levels and rotary tables must not become bfloat16.
    policy = policy_of(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    for name, block in list(model.blocks()):
        _read(model, block, name)
        # Torch before 2.7 does not gather adapters (float32) and frozen weights (bfloat16) together.
        adapters = [module for layer, module in block.named_modules() if layer.endswith((".lora_up", ".lora_down"))]
        if adapters:
            fully_shard(adapters, mesh=mesh, mp_policy=policy)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    _read(model, model, "")
    fully_shard(model, mesh=mesh, mp_policy=policy)
    _first_of("register_fsdp_forward_method", *_FSDP2)(model, "refined")
    return model


def let_go_of_gathered(model: nn.Module) -> None:
    """Make the next pass gather weights again: without a backward pass FSDP2 keeps those of the model's root, which may
    have changed by then."""
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if reshard is not None:
            reshard()


def _fsdp2() -> tuple[Any, Any]:
    """torch's fully_shard and MixedPrecisionPolicy.

    Raises:
        ValueError: if this build has no FSDP2.
    """
    return _first_of("fully_shard", *_FSDP2), _first_of("MixedPrecisionPolicy", *_FSDP2)


def _first_of(name: str, *modules: str) -> Any:
    """The attribute of the first of these modules that has it."""
    for module in modules:
        with suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), name)
    raise ValueError("This build of torch has no FSDP2: choose parallel = 'ddp', or install torch 2.6 or newer.")


def averaging(network: nn.Module, last: bool) -> AbstractContextManager[object]:
    """A context for a micro-batch's forward and backward pass, in which replicas average gradients only if it is the
    last of its step.

    FSDP2 averages in every micro-batch: whole gradients would need the memory that sharding is meant to save.
    """
    return nullcontext() if last or not hasattr(network, "no_sync") else network.no_sync()  # type: ignore[operator]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a shard of a tensor."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """The shard that this process holds, or all of a tensor."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; if it is sharded, every process calls this at the same point."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Set a tensor, or every process's shard of it, to `values`, the same in every process."""
    if is_sharded(tensor):
        sharded = cast(Any, tensor)
        distribute = _first_of("distribute_tensor", "torch.distributed.tensor", "torch.distributed._tensor")
        values = distribute(values.to(sharded.device), sharded.device_mesh, sharded.placements).to_local()
    local(tensor).copy_(values)


@torch.no_grad()
def exchange(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Swap the values of tensors of the same names; if they are sharded, it needs the memory of one more tensor."""
    for name, other in others.items():
        tensor = tensors[name]
        if is_sharded(tensor):
            # FSDP2 does not share the memory of its parameters, so only elements can be exchanged.
            mine, yours = local(tensor.detach()), local(other)
            kept = mine.clone()
            mine.copy_(yours)
            yours.copy_(kept)
        else:
            tensor.data, other.data = other.data, tensor.data


class Gathered:
    """A sharded tensor for a writer of files: it has the whole shape, and is gathered when it is read."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.read = False

    def element_size(self) -> int:
        """Bytes of an element."""
        return self._tensor.element_size()

    def detach(self) -> Tensor:
        """The whole tensor on the CPU; all processes take part."""
        self.read = True
        return whole(self._tensor.detach()).cpu()


def write_from_first(
    ranks: Ranks, tensors: Mapping[str, Tensor], write: Callable[[Mapping[str, Tensor]], object]
) -> None:
    """Make the first process write tensors to a file; all take part in gathering sharded ones.

    Args:
        ranks: the processes; all call this with the same names.
        tensors: what to write.
        write: takes them as `tensor_file.save` does, reading each once in `tensor_file.writing_order`.

    Raises:
        Exception: in the first process, what `write` raised.
        SystemExit: in the others then; they wait until the file is written.
    """
    gathered = {name: Gathered(tensor) if is_sharded(tensor) else tensor for name, tensor in tensors.items()}

    def write_then_gather_the_rest() -> None:
        try:
            write(cast("dict[str, Tensor]", gathered))
        finally:
            take_part()

    def take_part() -> None:
        """Also after an error: the others are still gathering tensors."""
        for name in writing_order(tensors):
            tensor = gathered[name]
            if isinstance(tensor, Gathered) and not tensor.read:
                tensor.detach()

    if not ranks.first:
        take_part()
    ranks.first_only(write_then_gather_the_rest)
