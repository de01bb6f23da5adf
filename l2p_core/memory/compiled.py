"""torch.compile for our models: block by block, so that one compiled block serves all similar ones.

Norms, modulation, rotary positions and gates then run as a few fused kernels between the matrix products. Compiling the
whole model as one graph would take minutes and gain nothing more. In sampling, float8 weights are converted by one
compiled kernel each, where the compiler reads float8. Parts that cannot be compiled stay eager: streamed layers, and in
training all of `block_store`'s, run between the fused kernels; neither the tiled head nor the head in training is
compiled.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from ..backbone import Backbone
from ..detailer import DetailerHead
from .frozen_store import DeviceTensor, FrozenLinear
from .trained_linear import TrainedLinear

_OLDEST = (2, 5)
_VERSIONS_OF_A_BLOCK = 64
"""Blocks differ in modulation, trained parameters, gradients and dynamic sizes; by default torch stops compiling
after 8 variants."""


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where it cannot work, before anything is loaded.

    Raises:
        ValueError: if torch is too old or has no compiler.
    """
    if _too_old():
        raise ValueError(
            f"Compiling needs torch 2.5 or newer, but this is {torch.__version__}: update torch, or do not compile."
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
                "Compiling for a CPU needs a C++ compiler, and none is installed: install one, or do not compile."
            ) from None


def compile_blocks(model: nn.Module, **settings: Any) -> None:
    """Compile the blocks of a model in place, and its head when it is evaluated whole and without gradients.

    Parameter names, and therefore checkpoints, stay the same. Compilation happens at the first call of each kind and
    again when sizes change. Call this last, after layers have been stored in their final form; see `check_compiler`.

    Args:
        model: a Backbone, or a part of one.
        settings: of `torch.compile`, such as `backend` and `mode`.
    """
    import torch._dynamo

    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, max(_VERSIONS_OF_A_BLOCK, getattr(torch._dynamo.config, limit)))
    for module in model.modules():
        # The location and arrival of a streamed weight are invisible to a compiler of tensor operations.
        if isinstance(module, TrainedLinear):
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
        elif isinstance(module, FrozenLinear):
            module.traced = isinstance(module.place, DeviceTensor) and _reads_float8(module.device)
            module.product = torch.compiler.disable(module.product)  # type: ignore[method-assign]
        elif isinstance(module, DetailerHead):
            module.compiled = torch.compile(module.whole, **settings)
    for _, block in model.blocks() if isinstance(model, Backbone) else ():
        block.compile(**settings)


def _reads_float8(device: torch.device) -> bool:
    """Whether compiled kernels can read float8 (e4m3fn): Triton's from NVIDIA's compute capability 8.9 on.

    Not used on CPUs, where a lookup table (`ops.eight_bit`) is faster.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def _too_old() -> bool:
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST
