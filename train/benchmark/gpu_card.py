"""The device's best possible performance, as a reference for the other rows."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import torch

from .gpu_measure import Bench, Figures, timed


def name(bench: Bench, _: Any) -> Figures:
    """The card, its memory and its driver."""
    if bench.gpu is None:
        return {"value": f"CPU, {torch.get_num_threads()} threads"}
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
    a, b = (torch.randn(side, side, device=bench.device).bfloat16() for _ in range(2))
    figures = timed(bench, lambda: a @ b)
    return figures | {"value": f"{2 * side**3 / figures['ms'] / 1e9:.1f} TFLOP/s"}
