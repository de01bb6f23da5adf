"""The facts about a machine for a bug report: versions, devices, memory, and missing libraries and their use.

It reports nothing else about the user: no paths, no names. It never fails and needs nothing but Python: facts that
cannot be determined are reported as unknown.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from ..version import __version__

Facts = dict[str, Any]
"""{section: {fact: value}}, and under "missing" a list of sentences."""


class _Library(NamedTuple):
    """A library's package name, what needs it, and the lowest supported version."""

    name: str
    use: str
    least: tuple[int, ...] = ()
    required: bool = False


_LIBRARIES = (
    _Library("torch", "everything", (2, 4), required=True),
    _Library("einops", "everything", required=True),
    _Library("numpy", "everything", (1, 25), required=True),
    _Library("safetensors", "everything", (0, 4, 2), required=True),
    _Library("pillow", "reading and writing images", required=True),
    _Library("psutil", "planning memory", required=True),
    _Library("tqdm", "progress bars", required=True),
    _Library("transformers", "language models on the command line: --encoder, l2p prompts --model", (4, 51)),
    _Library("datasketch", "prompts without near-duplicates", (1, 6)),
    _Library("bitsandbytes", "optimiser_bits = 8", (0, 50)),
    _Library("matplotlib", "l2p demo and the figures of l2p benchmark", (3, 7)),
    _Library("tensorboard", "TensorBoard events of a run", (2, 14)),
    _Library("pillow-heif", "HEIC images"),
    _Library("pillow-jxl-plugin", "JPEG XL images"),
    _Library("tifffile", "Save TIFF, and TIFF images with more than 8 bits per channel"),
    _Library("av", "PNG images with 16 bits per channel, and EXR images", (13,)),
    _Library("imagecodecs", "compressed TIFF images with more than 8 bits per channel"),
    _Library("pydicom", "DICOM images", (3,)),
    _Library("pylibjpeg", "DICOM images in JPEG-LS, JPEG 2000 and 12-bit JPEG, with its plugins"),
)
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "HSA_OVERRIDE_GFX_VERSION",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ENABLE_MPS_FALLBACK",
    "TORCH_DEVICE_BACKEND_AUTOLOAD", "OMP_NUM_THREADS", "WORLD_SIZE",
)  # fmt: skip
"""Environment variables that decide which devices torch has and how it allocates their memory."""
_LONGEST = 200  # characters shown of an error or a variable


def examine(host: Mapping[str, str] | None = None) -> Facts:
    """Collect the facts.

    Args:
        host: facts that the surrounding program reports about itself, such as its version and options.
    """
    sections: dict[str, Callable[[], Any]] = {
        "versions": _versions,
        "host": lambda: dict(host or {}) | ({} if host else _host_around()),
        "devices": _devices,
        "memory": _memory,
        "environment": lambda: {name: _short(os.environ[name]) for name in _VARIABLES if name in os.environ},
        "missing": _missing,
    }
    return {name: _found(find) for name, find in sections.items()}


def as_text(facts: Facts) -> str:
    """The facts as lines to paste into a bug report."""
    lines = []
    for section, found in facts.items():
        lines.append(f"{section}:")
        if isinstance(found, Mapping):
            lines += [f"  {name}: {said}" for name, said in found.items()] or ["  none"]
        else:
            lines += [f"  {said}" for said in ([found] if isinstance(found, str) else found)] or ["  nothing"]
    return "\n".join(lines)


def _found(find: Callable[[], Any]) -> Any:
    """The fact, or why it is unknown: this module has to work in damaged installations."""
    try:
        return find()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {_short(str(error))})"


def _versions() -> Facts:
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    versions: Facts = {"l2p": __version__, "python": f"{platform.python_version()} on {system}"}
    for library in _LIBRARIES:
        version = _version(library.name)
        if version:
            versions[library.name] = version
    if "torch" in versions:
        versions["torch is built for"] = _found(_torch_build)
    return versions


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch_build() -> str:
    import torch

    kinds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": getattr(torch.version, "xpu", None)}
    built = [f"{kind} {version}" for kind, version in kinds.items() if version]
    if torch.backends.mps.is_built():
        built.append("MPS")
    return ", ".join(built) or "CPU alone"


def _host_around() -> Facts:
    """ComfyUI's version, if this package lies in its folder of custom nodes."""
    file = Path(__file__).parents[4] / "comfyui_version.py"
    if not file.is_file():
        return {}
    found = [line.partition("=")[2].strip(" \"'\n") for line in file.open(encoding="utf-8") if "__version__ =" in line]
    return {"ComfyUI": found[0]} if found else {}


def _devices() -> Facts:
    from . import accelerator

    found: Facts = {"cpu": _found(_processor)}
    for kind, count in accelerator.available().items():
        for index in range(count):
            found[f"{kind}:{index}"] = _found(partial(_device, f"{kind}:{index}"))
    return found


def _processor() -> str:
    import torch

    return (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} threads, torch uses {torch.get_num_threads()}"
    )


def _device(name: str) -> str:
    import torch

    from . import accelerator

    device = torch.device(name)
    if not accelerator.has_own_memory(device.type):
        return "shares the system's memory"
    module = accelerator.module(device)
    properties = module.get_device_properties(device)
    said = [
        module.get_device_name(device),
        f"{_gigabytes(properties.total_memory)} in total",
        f"{_gigabytes(accelerator.free_bytes(device))} free",
    ]
    if hasattr(properties, "gcnArchName"):
        said.append(properties.gcnArchName)
    elif hasattr(properties, "major"):
        said.append(f"compute capability {properties.major}.{properties.minor}")
    return ", ".join(said)


def _memory() -> Facts:
    import psutil

    ram, swap = psutil.virtual_memory(), _found(lambda: _gigabytes(psutil.swap_memory().total))
    return {
        "RAM": f"{_gigabytes(ram.total)} in total, {_gigabytes(ram.available)} free",
        "swap": swap,
        "disk of the current folder": _found(lambda: f"{_gigabytes(shutil.disk_usage('.').free)} free"),
    }


def _missing() -> list[str]:
    """Sentences about libraries that are missing or too old, and what needs them."""
    sentences = []
    for library in _LIBRARIES:
        version = _version(library.name)
        wanted = library.name + (f" {'.'.join(map(str, library.least))} or newer" if library.least else "")
        if version is None:
            kind = "needed" if library.required else "optional"
            sentences.append(f"{wanted} is not installed; {kind} for {library.use}.")
        elif _numbers(version) < library.least:
            sentences.append(f"{library.name} {version} is too old for {library.use}: it needs {wanted}.")
    if not importlib.util.find_spec("tomllib") and not importlib.util.find_spec("tomli"):
        sentences.append("tomli is not installed; needed for recipes with Python 3.10.")
    return sentences


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers at the start of a version: (2, 13, 0) for "2.13.0+cpu"."""
    return tuple(map(int, takewhile(str.isdecimal, version.split("+")[0].split("."))))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _short(text: str) -> str:
    """A text on one line, with the home folder's path, which contains the user's name, replaced."""
    line = " ".join(text.split()).replace(str(Path.home()), "~")
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
