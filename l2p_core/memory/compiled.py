"""torch.compile for a model of ours: block by block, so that one compiled block serves all that are like it.

Norms, modulation, rotary positions and gates then run as a few fused kernels between the matrix products. A whole
model as one graph would take minutes to compile and gain nothing more. What can not be compiled stays as it is: layers
that are stored in few bits or streamed (`block_store`) run between the fused pieces, the head in tiles and the head in
training run without.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from ..backbone import Block
from ..detailer import DetailerHead
from .frozen_store import FrozenLinear
from .trained_linear import TrainedLinear

_OLDEST = (2, 5)
_VERSIONS_OF_A_BLOCK = 64
"""Blocks differ in modulation, in what trains, with and without gradients, with and without dynamic sizes; torch stops
compiling after 8."""


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where that cannot work, before anything is loaded.

    Raises:
        ValueError: if torch is too old, or there is no compiler behind it.
    """
    if _too_old():
        raise ValueError(
            f"Compiling needs torch 2.5 or newer, this is {torch.__version__}: update torch, or do not compile."
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError(
            "Compiling for a GPU needs Triton, which is not installed: install the package triton (on Windows "
            "triton-windows), or do not compile."
        )
    if device.type == "cpu":
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            raise ValueError(
                "Compiling for a CPU needs a C++ compiler, and there is none: install one, or do not compile."
            ) from None


def compile_blocks(model: nn.Module, **settings: Any) -> None:
    """Compile the blocks of a model in place, and its head where it is evaluated whole and without gradients.

    Names of parameters stay, and with them checkpoints. Compilation happens in the first call of each kind, and again
    when sizes change. Call it last, when layers are stored as they will be; see `check_compiler`.

    Args:
        model: a Backbone.
        settings: of `torch.compile`, such as `backend` and `mode`.
    """
    import torch._dynamo

    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, max(_VERSIONS_OF_A_BLOCK, getattr(torch._dynamo.config, limit)))
    for module in model.modules():
        if isinstance(module, (FrozenLinear, TrainedLinear)):
            # Where its weight is, and when it comes, is no matter of tensors.
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(**settings)
        elif isinstance(module, DetailerHead):
            module.compiled = torch.compile(module.whole, **settings)


def _too_old() -> bool:
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST
