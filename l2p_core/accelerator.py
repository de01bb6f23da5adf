"""GPUs, whoever made them: torch has a module for each kind (torch.cuda, torch.xpu and others), and they are alike."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from threading import Event
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")
_warned = Event()


def default_device() -> torch.device:
    """A GPU if there is one that training is for, else the CPU."""
    accelerator = getattr(torch, "accelerator", None)  # since torch 2.6
    if accelerator is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not accelerator.is_available():
        return CPU
    device = torch.device(accelerator.current_accelerator().type)
    return device if has_own_memory(device.type) else CPU


def has_own_memory(device_type: str) -> bool:
    """Whether a kind of device ("cuda", "cpu", ...) has memory beside the computer's; a CPU and Apple's GPUs do not."""
    return device_type not in ("cpu", "mps")


def module(device: torch.device) -> Any:
    """torch.cuda, or what is like it for a device that has memory of its own."""
    return getattr(torch, device.type)


def free_bytes(device: torch.device) -> int:
    """Bytes that nobody has taken of the memory of a device that has its own."""
    of_device = module(device)
    if hasattr(of_device, "mem_get_info"):
        return of_device.mem_get_info(device)[0]
    # torch.xpu learned to tell in later versions; what other programs hold is not known before.
    return of_device.get_device_properties(device).total_memory - of_device.memory_reserved(device)


def empty_cache(device: torch.device) -> None:
    """Give memory that torch holds for a device without using it back to the system."""
    if has_own_memory(device.type):
        module(device).empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, a device's or the system's, ran out: torch raises a class of its own for its
    allocators, the communication libraries (NCCL, gloo) one of theirs with CUDA's words in it."""
    words = str(error).lower()
    own = isinstance(error, torch.cuda.OutOfMemoryError)
    return own or (isinstance(error, RuntimeError) and ("out of memory" in words or "can't allocate memory" in words))


def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor in pinned RAM, from which a GPU copies while it computes.

    Systems limit how much may be pinned. Beyond that it is ordinary RAM, which is copied more slowly; the first time,
    a warning says so.
    """
    try:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        _warn_unpinned(str(error).partition("\n")[0])
        return torch.empty(tuple(shape), dtype=dtype)


def _warn_unpinned(reason: str) -> None:
    """Say once a process why memory is not pinned."""
    if _warned.is_set():
        return
    _warned.set()
    logging.getLogger(__name__).warning(
        "L2P: the system did not pin more RAM (%s). Training goes on with ordinary RAM, from which copies to the GPU "
        "are slower; closing other programs, or a higher limit of locked memory, may help.",
        reason,
    )
