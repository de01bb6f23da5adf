"""The memory of a computation, found by running it on tensors that have shapes but no data (device "meta").

Every tensor that an operation returns is watched until torch releases it, in the forward and the backward pass, so the
result comes from the model's own code, not from a separate formula. Attention is assumed to keep no table of tokens by
tokens, like torch's fused kernels. Other operations are counted as torch decomposes them without a device; a GPU with a
fused kernel for one of them (newer versions for RMS norm) keeps less. The copies that a GPU's half-precision
convolutions make of maps whose channels are not a multiple of 8 are counted during the convolution.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ContextDecorator, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..backbone import Backbone
from ..ops.head_tiles import CHANNEL_MULTIPLE
from ..patch import padded_size


class Traced(NamedTuple):
    """Bytes beyond a computation's inputs and weights: of its outputs; of what it keeps from the forward to the
    backward pass, outputs included; and at the peak, with the gradients of outputs and inputs. And the elements of the
    weights that get gradients, and what makes outputs like its own."""

    output: int
    retained: int
    peak: int
    gradients: int
    outputs: Callable[[], Any]


def trace(function: Callable[..., Any], inputs: Sequence[Any], weights: Iterable[Tensor]) -> Traced:
    """Run a function forward and backward and measure it.

    Args:
        function: takes the inputs and returns one or several tensors.
        inputs: tensors on the device "meta", of which copies are used, and other arguments.
        weights: all that it uses. Their gradients count while they are computed and are released when complete.
    """
    inputs = [torch.empty_like(x).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
    weights, complete = list(weights), list[int]()
    live = LiveMemory([*(x for x in inputs if isinstance(x, Tensor)), *weights])
    with consumed(weights, complete.append), live:
        made = function(*inputs)
        outputs = tree_leaves(made)
        size, retained = storage_bytes(outputs), live.now
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
        peak = live.peak
    like = tree_map(lambda output: torch.empty_like(output, requires_grad=False), made)
    return Traced(min(size, retained), retained, peak, sum(complete), lambda: tree_map(torch.empty_like, like))


@contextmanager
def consumed(weights: Iterable[Tensor], use: Callable[[int], None]) -> Iterator[None]:
    """Within it, gradients of weights are released when complete, and their elements given to `use`."""

    def complete(weight: Tensor) -> None:
        use(weight.numel())
        weight.grad = None

    hooks = [weight.register_post_accumulate_grad_hook(complete) for weight in weights if weight.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of these tensors."""
    return sum({id(x.untyped_storage()): x.untyped_storage().nbytes() for x in tensors}.values())


def computing_in(model: Backbone, dtype: torch.dtype) -> None:
    """Make a model's layers cast inputs and weights like autocast, which does not exist for the device "meta"."""
    mode = _Cast(dtype)
    # Attention is computed somewhere inside a block.
    blocks = [block for _, block in model.blocks()]
    inside = {module for block in blocks for module in block.modules()}
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for module in [*blocks, *(layer for layer in layers if layer not in inside)]:
        module.forward = mode(module.forward)


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors from the operation that returns them until they are released."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]
        self._ids = {id(storage) for storage in self._known}
        self._watched: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from loading its compiler, which takes seconds, only to find that nothing here is compiled."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = _joined(*args) if func is torch.ops.aten.cat.default else func(*args, **(kwargs or {}))
        workspace = _workspace(func, args)
        self.now += workspace
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        self.now -= workspace
        return made

    def _watch(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._ids or key in self._watched:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._watched[key]

        self._watched[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """What `torch.cat` allocates; for "meta" it would load torch's compiler."""
    sizes = list(tensors[0].shape)
    sizes[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return torch.empty(sizes, dtype=torch.result_type(tensors[0], tensors[-1]), device=tensors[0].device)


def _workspace(func: Any, args: Any) -> int:
    """Bytes of the copies that a GPU convolution makes of maps whose channels it pads to a multiple, and of an input
    that is cut out of a larger map.

    The copies of inputs were measured on an H100; the backward pass is assumed to copy each padded map that it reads.
    """
    aten = torch.ops.aten
    if func is aten.convolution.default:
        x = args[0]
        cut = not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
        return _padded_bytes(x) or (x.nbytes if cut else 0)
    return sum(map(_padded_bytes, args[:2])) if func is aten.convolution_backward.default else 0


def _padded_bytes(x: Tensor) -> int:
    if x.itemsize != 2 or x.shape[1] % CHANNEL_MULTIPLE == 0:
        return 0
    return x.numel() // x.shape[1] * padded_size(x.shape[1], CHANNEL_MULTIPLE) * x.itemsize


class _Cast(TorchFunctionMode, ContextDecorator):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _FusedAttention.apply(*[tensor.to(self._dtype) for tensor in args[:3]])
        if func in (F.linear, F.conv2d):
            args = [arg.to(self._dtype) if isinstance(arg, Tensor) else arg for arg in args]
        return func(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    """What fused attention allocates and keeps: its output, and one value per query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, output, torch.empty(q.shape[:-1], device=q.device))
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
