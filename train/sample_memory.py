"""The device, weight storage and head tiles of `l2p sample`, chosen by free memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from ..l2p_core.config import PixelConfig
from ..l2p_core.device import accelerator
from ..l2p_core.device.system_memory import available_memory, free_memory_and_swap
from ..l2p_core.memory.placement import Form
from ..l2p_core.memory.plan import GB, gigabytes
from ..l2p_core.memory.sampling_memory import choose_tile, step_bytes
from ..l2p_core.memory.sampling_model import WeightMemory, weight_memory
from ..l2p_core.ops.fused_decoder import fused_from
from ..l2p_core.ops.head_tiles import TILES
from ..l2p_core.sources import source_of

_SPARE = 300 * 10**6
"""Bytes of device memory that the device's libraries take."""

_BF16 = Form(torch.bfloat16)
_FP8 = Form(torch.bfloat16, float8=True)
_STREAMED = (Form(torch.bfloat16, streamed=True), Form(torch.bfloat16, float8=True, streamed=True))

_FORMS: dict[str, Callable[[torch.dtype], Iterable[Form]]] = {
    "auto": lambda stored: dict.fromkeys([Form(stored), _BF16, _FP8, *_STREAMED]),
    "bf16": lambda stored: (_BF16,),
    "fp8": lambda stored: (_FP8,),
    "streamed": lambda stored: _STREAMED,
}
"""The forms for each value of `--weights`, given the dtype of the file; the first that fits is used."""


@dataclass(frozen=True)
class Choice:
    """The device and form of a model.

    Attributes:
        device: to compute on.
        form: of its weights.
    """

    device: torch.device
    form: Form


@dataclass(frozen=True)
class Need:
    """The memory that sampling an image needs.

    Attributes:
        config: of the model.
        height, width: of the image in pixels.
        dtype: of the model's file.
    """

    config: PixelConfig
    height: int
    width: int
    dtype: torch.dtype

    def weights(self, form: Form) -> WeightMemory:
        """The memory of the weights."""
        return weight_memory(self.config, form)

    def on_device(self, form: Form) -> int:
        """The least device memory that suffices: the weights, and a step with the smallest tiles."""
        weights = self.weights(form)
        caption = source_of(self.config).encoder.max_tokens
        step = step_bytes(self.config, self.height, self.width, caption, form.dtype.itemsize, tile=TILES[-1])
        return weights.device + max(weights.loading, weights.computing + step) + _SPARE

    def tile(self, form: Form, caption: int, device: torch.device) -> int | None:
        """The side of the head's tiles for the memory that is free with the model loaded; None means the whole
        image."""
        accelerator.empty_cache(device)
        return choose_tile(
            self.config,
            self.height,
            self.width,
            caption,
            form.dtype.itemsize,
            free=free_bytes(device),
            fused_from=fused_from(device),
        )


@dataclass(frozen=True)
class _Room:
    """The free memory of a device.

    Attributes:
        device: to compute on.
        need: of memory.
    """

    device: torch.device
    need: Need

    @cached_property
    def free(self) -> int:
        return free_bytes(self.device)

    def first_that_fits(self, forms: Iterable[Form]) -> Form | None:
        own = accelerator.has_own_memory(self.device.type)
        for form in forms:
            # On a device without its own memory, streaming gains nothing.
            fits_ram = self.need.weights(form).ram <= available_memory() if own else not form.streamed
            if fits_ram and self.need.on_device(form) <= self.free:
                return form
        return None


def place(name: str | None, need: Need, weights: str = "auto") -> Choice:
    """The device to sample on: the named one, or a GPU with enough memory, or the CPU; and the form of the weights
    there, which is printed if it is not the file's.

    Args:
        name: of a device; None selects one.
        need: of memory.
        weights: "auto", "bf16", "fp8" or "streamed".

    Raises:
        ValueError: if the named device does not exist, or the selected one has too little memory.
    """
    device = accelerator.default_device() if name is None else accelerator.named(name)
    forms = list(_FORMS[weights](need.dtype))
    if accelerator.has_own_memory(device.type):
        room = _Room(device, need)
        form = room.first_that_fits(forms)
        if form is not None:
            accelerator.choose(device)
            return _stated(Choice(device, form), need, forms[0], room.free)
        short = _short(device, need, forms, room.free)
        if name is not None or weights == "streamed":
            raise ValueError(
                f"{short}: close other programs, make a smaller image, use --device cpu"
                f"{'' if weights == 'auto' else ', or remove --weights'}."
            )
        print(f"{short}: this runs on the CPU.", file=sys.stderr)
        device = accelerator.CPU
    if weights == "streamed":
        raise ValueError(
            f"--weights streamed is for GPUs with memory of their own, and this would run on {device}: remove it."
        )
    return _in_ram(device, need, forms)


def free_bytes(device: torch.device) -> int:
    """Free bytes in the memory where a device stores its tensors."""
    return accelerator.free_bytes(device) if accelerator.has_own_memory(device.type) else available_memory()


def _in_ram(device: torch.device, need: Need, forms: list[Form]) -> Choice:
    """The choice for a device without its own memory; swap is the last resort."""
    room = _Room(device, need)
    form = room.first_that_fits(forms)
    if form is not None:
        return _stated(Choice(device, form), need, forms[0], room.free)
    least = min((form for form in forms if not form.streamed), key=need.on_device)
    if need.on_device(least) > free_memory_and_swap():
        raise ValueError(
            f"Sampling needs about {gigabytes(need.on_device(least))} GB of RAM, and {room.free / GB:.1f} GB are free: "
            "close other programs, or make a smaller image."
        )
    return _stated(Choice(device, least), need, forms[0], room.free)


def _short(device: torch.device, need: Need, forms: list[Form], free: int) -> str:
    """The beginning of the sentence for memory that is too small for all forms."""
    least = min(forms, key=need.on_device)
    sentence = f"Sampling needs about {gigabytes(need.on_device(least))} GB of memory"
    if need.on_device(least) <= free:
        ram = f"{gigabytes(need.weights(least).ram)} GB of RAM for its weights, and {available_memory() / GB:.1f} GB"
        return f"{sentence} on {device} and {ram} are free"
    return f"{sentence}, and {device} has {free / GB:.1f} GB free"


def _stated(choice: Choice, need: Need, first: Form, free: int) -> Choice:
    """The choice; a sentence about it is printed if another form was preferred or blocks are not stored plainly."""
    form = choice.form
    if form == first and not form.float8 and not form.streamed:
        return choice
    weights = need.weights(form)
    kept = "in fp8" if form.float8 else "in bf16"
    where = f"{gigabytes(weights.device)} GB on {choice.device}"
    if form.streamed:
        kept += ", streamed from RAM block by block"
        where += f" and {gigabytes(weights.ram)} GB of RAM"
    reason = ""
    if form != first:
        reason = (
            f": {_words(first)} they would need {gigabytes(need.on_device(first))} GB, and {free / GB:.1f} GB are free"
        )
    print(f"The weights are kept {kept} ({where}){reason}.", file=sys.stderr)
    return choice


def _words(form: Form) -> str:
    return "in the file's own type" if form.dtype != torch.bfloat16 else "in fp8" if form.float8 else "in bf16"
