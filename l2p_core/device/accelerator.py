"""GPUs of every vendor: torch has a similar module for each kind (torch.cuda, torch.xpu and others)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from threading import Event
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")
_warned = Event()


def default_device() -> torch.device:
    """A GPU if there is one that can train, otherwise the CPU."""
    accelerator = getattr(torch, "accelerator", None)  # since torch 2.6
    if accelerator is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not accelerator.is_available():
        return CPU
    device = torch.device(accelerator.current_accelerator().type)
    return device if has_own_memory(device.type) else CPU


def named(text: str) -> torch.device:
    """The device that a user names, such as "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: if this machine does not have it; the message lists the available devices.
    """
    try:
        with warnings.catch_warnings():  # of names that torch is about to forget; what is not there is said here
            warnings.simplefilter("ignore")
            device = torch.device(text.strip().lower())
    except RuntimeError:
        device = None
    if device is not None and device.type == "cpu":
        return CPU
    kinds = available()
    if device is None or device.type not in kinds or (device.index or 0) >= kinds[device.type]:
        raise ValueError(f"This machine has no device {text!r}: it has {', '.join(_names(kinds))}.{_advice(text)}")
    return device


def available() -> dict[str, int]:
    """Number of usable devices of each kind besides the CPU."""
    kinds = ["cuda", "xpu", "mps"]
    current = getattr(torch, "accelerator", None) and torch.accelerator.current_accelerator()
    if current and current.type not in kinds:
        kinds.append(current.type)
    found = {}
    for kind in kinds:
        of_kind = getattr(torch, kind, None)
        if kind == "mps":
            count = int(torch.backends.mps.is_available())
        else:
            count = of_kind.device_count() if of_kind and of_kind.is_available() else 0
        if count:
            found[kind] = count
    return found


def _names(kinds: dict[str, int]) -> list[str]:
    """The valid names of the devices."""
    numbered = [f"{kind}:{i}" if count > 1 else kind for kind, count in kinds.items() for i in range(count)]
    return [CPU.type, *numbered]


def _advice(text: str) -> str:
    kind = text.partition(":")[0]
    if kind in ("hip", "rocm"):
        return " Torch calls AMD's GPUs cuda."
    if kind == "cuda" and not torch.version.cuda and not torch.version.hip:
        return " This torch is built without CUDA and ROCm: for an NVIDIA or AMD GPU, install a build that has it."
    return ""


def name_of(device: torch.device) -> str:
    """A device's name; for a CPU, with the number of threads that torch uses."""
    if not has_own_memory(device.type):
        return f"{device.type.upper()} with {torch.get_num_threads()} threads"
    return str(module(device).get_device_name(device))


def has_own_memory(device_type: str) -> bool:
    """Whether a kind of device ("cuda", "cpu", ...) has its own memory; a CPU and Apple's GPUs use system memory."""
    return device_type not in ("cpu", "mps")


def module(device: torch.device) -> Any:
    """torch.cuda, or its counterpart for another device with its own memory."""
    return getattr(torch, device.type)


def choose(device: torch.device) -> None:
    """Make a device the default one of its kind."""
    if has_own_memory(device.type) and device.index is not None:
        module(device).set_device(device)


def free_bytes(device: torch.device) -> int:
    """Free bytes of a device that has its own memory."""
    of_device = module(device)
    if hasattr(of_device, "mem_get_info"):
        return of_device.mem_get_info(device)[0]
    # Older versions of torch.xpu cannot report this; memory held by other programs is then unknown.
    return of_device.get_device_properties(device).total_memory - of_device.memory_reserved(device)


def empty_cache(device: torch.device) -> None:
    """Return memory that torch holds for a device without using it to the system."""
    if has_own_memory(device.type):
        module(device).empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory, a device's or the system's, ran out: torch raises its own class for its
    allocators; the communication libraries (NCCL, gloo) raise theirs with CUDA's message in it."""
    words = str(error).lower()
    own = isinstance(error, torch.cuda.OutOfMemoryError)
    return own or (isinstance(error, RuntimeError) and ("out of memory" in words or "can't allocate memory" in words))


def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor in pinned RAM, from which a GPU copies while it computes.

    Systems limit pinned memory. Beyond the limit this returns ordinary RAM, which is copied more slowly; the first
    time, a warning says so.
    """
    try:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        if not _warned.is_set():
            _warned.set()
            logging.getLogger(__name__).warning(
                "L2P: the system did not pin more RAM (%s). It uses ordinary RAM instead, from which copies to the GPU "
                "are slower; closing other programs, or a higher limit of locked memory, may help.",
                str(error).partition("\n")[0],
            )
        return torch.empty(tuple(shape), dtype=dtype)
