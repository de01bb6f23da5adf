"""The device's best possible performance, as a reference for the other rows."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...l2p_core.memory.sampling_memory import tokens_of
from .gpu_measure import Bench, Figures, timed

_TOGETHER = 20  # short measurements are queued so that the device is never idle


def name(bench: Bench, _: Any) -> Figures:
    """The card, its memory and its driver."""
    if bench.gpu is None:
        threads = torch.get_num_threads()
        return {"value": f"CPU, {threads} thread{'s' if threads > 1 else ''}"}
    memory = bench.gpu.get_device_properties(bench.device).total_memory
    return {"value": f"{bench.gpu.get_device_name(bench.device)}, {memory / 1e9:.1f} GB{_driver()}", "memory": memory}


def _driver() -> str:
    """NVIDIA's driver version, if its tool is installed."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return ""
    return f", driver {said[0]}" if said else ""


def software(bench: Bench, _: Any) -> Figures:
    """torch and its build."""
    build = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return {"value": f"torch {torch.__version__}{build}"}


def to_device(bench: Bench, _: Any) -> Figures:
    """Bandwidth from pinned memory."""
    home, here = _buffers(bench)
    return _bandwidth(bench, timed(bench, lambda: here.copy_(home, non_blocking=True)))


def from_device(bench: Bench, _: Any) -> Figures:
    """Bandwidth to pinned memory."""
    home, here = _buffers(bench)
    return _bandwidth(bench, timed(bench, lambda: home.copy_(here, non_blocking=True)))


def _buffers(bench: Bench) -> tuple[torch.Tensor, torch.Tensor]:
    size = bench.scale.copied
    home = torch.zeros(size, dtype=torch.uint8, pin_memory=bench.gpu is not None)
    return home, torch.zeros(size, dtype=torch.uint8, device=bench.device)


def _bandwidth(bench: Bench, figures: Figures) -> Figures:
    return figures | {"value": f"{bench.scale.copied / figures['ms'] / 1e6:.1f} GB/s"}


def matmul(bench: Bench, _: Any) -> Figures:
    """Speed of a large bf16 product."""
    side = bench.scale.matmul
    return _product(bench, side, side, side)


PRODUCTS = {
    "qkv product": (("dim", 1), ("dim", 3)),
    "out product": (("dim", 1), ("dim", 1)),
    "w1 product": (("dim", 1), ("ffn_dim", 1)),
    "w1 and w3 as one product": (("dim", 1), ("ffn_dim", 2)),
    "w2 product": (("ffn_dim", 1), ("dim", 1)),
}
"""The products of a block: input and output channels, each as a size of the model times a factor."""


@dataclass(frozen=True)
class ProductSpeed:
    """Measures the speed of a bf16 product of a block at 1024 pixels; arguments as in `PRODUCTS`."""

    inputs: tuple[str, int]
    outputs: tuple[str, int]

    def __call__(self, bench: Bench, _: Any) -> Figures:
        (inside, times), (outside, factor) = self.inputs, self.outputs
        source = bench.scale.source
        return _product(bench, _tokens(bench), getattr(source, inside) * times, getattr(source, outside) * factor)


def _product(bench: Bench, rows: int, inside: int, outside: int) -> Figures:
    x, weight = (torch.randn(size, inside, device=bench.device).bfloat16() for size in (rows, outside))
    return _speed(timed(bench, lambda: F.linear(x, weight), together=_TOGETHER), 2 * rows * inside * outside)


def _speed(figures: Figures, operations: float) -> Figures:
    return figures | {"value": f"{operations / figures['ms'] / 1e9:.1f} TFLOP/s"}


def _tokens(bench: Bench) -> int:
    """The number of tokens of an image of 1024 pixels and its caption."""
    side = bench.scale.sides["1k"]
    return tokens_of(bench.scale.config("1k"), side, side, bench.scale.caption)


ATTENTION = {
    "as torch chooses": None, "cuDNN": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"
}  # fmt: skip
"""Torch's kernels by our names."""


@dataclass(frozen=True)
class AttentionSpeed:
    """Measures the speed of a block's attention at 1024 pixels in bf16, with a key of `ATTENTION`."""

    kernel: str

    def __call__(self, bench: Bench, _: Any) -> Figures:
        source, tokens = bench.scale.source, _tokens(bench)
        shape = 1, tokens, source.n_heads, source.head_dim
        q, k, v = (torch.randn(shape, device=bench.device).bfloat16().transpose(1, 2) for _ in range(3))
        backend = ATTENTION[self.kernel]
        if backend is not None and not hasattr(SDPBackend, backend):
            return {"value": "not in this torch"}
        try:
            with nullcontext() if backend is None else sdpa_kernel(getattr(SDPBackend, backend)):
                figures = timed(bench, lambda: F.scaled_dot_product_attention(q, k, v), together=_TOGETHER)
        except RuntimeError:
            if backend is None:
                raise
            return {"value": "not available here"}
        return _speed(figures, 4 * tokens**2 * source.n_heads * source.head_dim)
