"""An accelerator for machines without one: memory of its own, kept apart from the CPU's, computed with by the CPU.

Where a tensor lies, what a device's memory holds at most, whether copies are waited for: a CPU shows none of it, and
the device of `simulated.cpp` does. It is called "npu", the name of one that ComfyUI knows, and says for itself what
`torch.cuda` says for a GPU.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.utils.backend_registration as backend

SOURCE = Path(__file__).with_name("simulated.cpp")
NAME = "npu"


def why_not() -> str | None:
    """Why it cannot be had here, if so."""
    if os.name != "posix" or not shutil.which("g++"):
        return "the simulated accelerator is built with g++"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9):
        return "the simulated accelerator is written for torch 2.9 and newer"
    return None


def built() -> Path:
    """The library, compiled (half a minute) unless it was before for this torch; by one process, others wait for it."""
    identity = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = SOURCE.parents[2] / "build" / f"simulated-accelerator-{identity}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        with library.with_suffix(".lock").open("w") as lock:
            if sys.platform != "win32":
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                _build(library)
    return library


def _build(library: Path) -> None:
    root = Path(torch.__file__).parent
    part = library.with_suffix(f".{os.getpid()}")
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    link = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = ["g++", "-shared", "-fPIC", "-O1", "-std=c++20", *include, str(SOURCE), "-o", str(part), *link]
    subprocess.run(command, check=True)
    part.replace(library)


def installed() -> types.ModuleType:
    """The device's module, `torch.npu`, once a process."""
    if hasattr(torch, NAME):
        return getattr(torch, NAME)
    torch.ops.load_library(built())
    backend.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    backend.generate_methods_for_privateuse1_backend()
    _Tensor.data = property(_Data.__get__, _set_data)
    limit = os.environ.get("SIMULATED_ACCELERATOR_BYTES")
    if limit:
        torch.ops.simulated_accelerator.set_limit(int(limit))
    return getattr(torch, NAME)


_Tensor: Any = torch.Tensor
_Data: Any = torch.Tensor.data


def _set_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """As torch sets `tensor.data`; it lets a CPU's tensor become a GPU's, but none of the device that is simulated."""
    if tensor.device.type == data.device.type:
        _Data.__set__(tensor, data)
    else:
        torch._C._swap_tensor_impl(tensor, data.detach().requires_grad_(tensor.requires_grad))


def _module() -> types.ModuleType:
    library = torch.ops.simulated_accelerator
    module = types.ModuleType(f"torch.{NAME}")

    def memory_stats(device: object = None) -> dict[str, int]:
        taken = library.memory_allocated()
        return {"active_bytes.all.current": taken, "reserved_bytes.all.current": taken}

    def mem_get_info(device: object = None) -> tuple[int, int]:
        return library.memory_limit() - library.memory_allocated(), library.memory_limit()

    def stream(stream: torch.Stream) -> torch.Stream:
        return stream  # a torch.Stream is its own context

    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "simulated accelerator",
        "get_device_properties": lambda device=None: types.SimpleNamespace(total_memory=library.memory_limit()),
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": lambda seed: None,
        "memory_stats": memory_stats,
        "mem_get_info": mem_get_info,
        "memory_allocated": lambda device=None: library.memory_allocated(),
        "memory_reserved": lambda device=None: library.memory_allocated(),
        "max_memory_allocated": lambda device=None: library.max_memory_allocated(),
        "max_memory_reserved": lambda device=None: library.max_memory_allocated(),
        "reset_peak_memory_stats": lambda device=None: library.reset_peak(),
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: torch.accelerator.synchronize(),
        "Stream": lambda device=None: torch.Stream(device=torch.device(NAME, 0)),
        "stream": stream,
        "current_stream": lambda device=None: torch.accelerator.current_stream(),
    }
    for name, function in functions.items():
        setattr(module, name, function)
    return module
