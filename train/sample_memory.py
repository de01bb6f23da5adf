"""Where `l2p sample` computes, and in which tiles: what memory is free decides both."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from ..l2p_core import accelerator
from ..l2p_core.config import ModelConfig
from ..l2p_core.head_tiles import TILES
from ..l2p_core.plan import GB, gigabytes
from ..l2p_core.run.planning import MAX_CAPTION
from ..l2p_core.sampling_memory import choose_tile, step_bytes
from ..l2p_core.system_memory import available_memory, computer_memory

_SPARE = 300 * 10**6
"""Bytes that a device's libraries take."""


@dataclass(frozen=True)
class Need:
    """What sampling an image needs of memory.

    Attributes:
        config: of the model.
        parameters: how many the model has.
        height, width: of the image in pixels.
        itemsize: bytes of a parameter in the dtype computed in.
    """

    config: ModelConfig
    parameters: int
    height: int
    width: int
    itemsize: int

    @property
    def nbytes(self) -> int:
        """The least with which it can be done: weights, and a step with the smallest tiles."""
        step = step_bytes(self.config, self.height, self.width, MAX_CAPTION, self.itemsize, tile=TILES[-1])
        return self.parameters * self.itemsize + step + _SPARE

    def tile(self, caption: int, free: int) -> int | None:
        """The side of the head's tiles where so many bytes are free with the model loaded; None is the whole image."""
        return choose_tile(self.config, self.height, self.width, caption, self.itemsize, free=free)


def place(name: str | None, need: Need) -> torch.device:
    """The device to sample on: the named one, or a GPU if there is one with enough memory, or the CPU.

    Raises:
        ValueError: if the named one is not there, or the one to use has too little memory.
    """
    device = accelerator.default_device() if name is None else accelerator.named(name)
    if accelerator.has_own_memory(device.type):
        free = accelerator.free_bytes(device)
        if need.nbytes <= free:
            accelerator.choose(device)
            return device
        short = f"Sampling needs about {gigabytes(need.nbytes)} GB of memory, and {device} has {free / GB:.1f} GB free"
        if name is not None:
            raise ValueError(
                f"{short}: close other programs, make a smaller image, use --device cpu, or sample in ComfyUI, which "
                "needs less by offloading."
            )
        print(f"{short}: this runs on the CPU.", file=sys.stderr)
        device = accelerator.CPU
    if need.nbytes > computer_memory():
        raise ValueError(
            f"Sampling needs about {gigabytes(need.nbytes)} GB of RAM, and this machine has "
            f"{gigabytes(computer_memory())} GB, swap included: make a smaller image."
        )
    return device


def free_bytes(device: torch.device) -> int:
    """Bytes that are free where a device keeps its tensors."""
    return accelerator.free_bytes(device) if accelerator.has_own_memory(device.type) else available_memory()
