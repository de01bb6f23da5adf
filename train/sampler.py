"""An L2P model that samples from the command line: opened from its header, placed in memory, then loaded."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..l2p_core import flow
from ..l2p_core.checkpoint import Checkpoint, open_checkpoint
from ..l2p_core.config import VARIANTS
from ..l2p_core.deltas.delta_on_base import Merged, open_merged, verify
from ..l2p_core.device import accelerator
from ..l2p_core.files.tensor_io import TORCH_DTYPES
from ..l2p_core.memory import sampling_model
from ..l2p_core.memory.compiled import check_compiler, compile_blocks
from ..l2p_core.model import L2PModel
from ..l2p_core.ops.head_tiles import LEAST_TILE
from ..l2p_core.run.base import fingerprint
from ..l2p_core.run.memory_plan import MemoryRanOut
from ..l2p_core.sources import sampling_of
from ..l2p_core.tiny import bundled
from ..l2p_core.tiny.bundled import is_tiny
from ..l2p_core.tiny.shapes import IMAGE_SIZE
from .console import bar, byte_progress
from .sample_memory import Choice, Need, place


class SamplingSettings(NamedTuple):
    """The settings of a sampling run, as typed or published."""

    steps: int
    cfg: float
    shift: float
    denoise: float


class Sampler:
    """The model that a command's options name; its weights are read by `load`.

    Args:
        args: model, delta, steps, cfg, shift, denoise, tile, weights, compile and device, as `l2p sample` has them.

    Raises:
        ValueError: for a file that is not an L2P model, or a delta of another base.
    """

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self.base, trained = _files(args.model, args.delta)
        self._files = [path for path in (self.base, trained) if path]
        # From the header, so that other errors are reported before gigabytes are read.
        self._opened = (
            open_merged(trained, self.base, args.unchecked_base)
            if trained
            else Merged(open_checkpoint(self.base), {}, {})
        )
        self.config = self._opened.checkpoint.pixel_config(plain=False)
        row = sampling_of(self.config)
        self.settings = SamplingSettings(
            steps=args.steps or row.steps,
            cfg=row.cfg if args.cfg is None else args.cfg,
            shift=row.shift if args.shift is None else args.shift,
            denoise=args.denoise,
        )

    @property
    def identity(self) -> str:
        """The names of the model's files and a mark of their content."""
        mark = hashlib.sha256("".join(map(fingerprint, self._files)).encode()).hexdigest()[:8]
        return f"{' + '.join(path.name for path in self._files)} ({mark})"

    @property
    def side(self) -> int:
        """The side in pixels of the square images that the model was trained at."""
        return IMAGE_SIZE if is_tiny(self.config) else VARIANTS[self.config.variant].pixels

    def place(self, width: int, height: int) -> torch.device:
        """Choose where the weights go and in which form; returns the device.

        Raises:
            ValueError: for a device that does not exist, has too little memory, or has no compiler.
        """
        self._size = width, height
        self._need = Need(self.config, height, width, _dtype(self.base, self._opened.checkpoint))
        self._choice = place(self._args.device, self._need, self._args.weights)
        if self._args.compile:
            check_compiler(self._choice.device)
        return self._choice.device

    def load(self, tokens: int) -> None:
        """Read the weights, for captions of at most so many tokens; after `place`."""
        args, choice = self._args, self._choice
        self._model = _load(self._opened, choice)
        self._model.tile = (
            max(args.tile, LEAST_TILE) if args.tile else self._need.tile(choice.form, tokens, choice.device)
        )
        if args.compile:
            compile_blocks(self._model)

    def image(
        self,
        positive: Tensor,
        negative: Tensor | None,
        noise: Tensor,
        text: str,
        init: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """One image (3, H, W) in [-1, 1] on the CPU.

        Args:
            positive: the caption's features (L, caption_dim).
            negative: those of the caption to guide away from; None without guidance.
            noise: (1, 3, H, W), drawn on the CPU, so that a seed produces the same image on every machine.
            text: of the progress bar.
            init: the image to start from, (1, 3, H, W).
            mask: where it is repainted, (1, 1, H, W) in [0, 1]; None is everywhere.

        Raises:
            MemoryRanOut: when less memory was there than was free at the start.
        """
        device = self._choice.device
        try:
            with bar(text, unit="step", total=self.settings.steps, leave=None) as shown:
                return flow.sample(
                    self._model,
                    noise.to(device),
                    [positive.to(device)],
                    sigmas=flow.sigmas(self.settings.steps, self.settings.shift, self.settings.denoise),
                    cfg=self.settings.cfg,
                    negative=None if negative is None else [negative.to(device)],
                    init=None if init is None else init.to(device),
                    mask=None if mask is None else mask.to(device),
                    progress=lambda *_: shown.update(),
                )[0].cpu()
        except RuntimeError as error:
            if not accelerator.is_out_of_memory(error):
                raise
            raise _ran_out(self._choice, *self._size, self._model.tile) from None


def noise_of(seed: int, width: int, height: int) -> Tensor:
    """A seed's noise, (1, 3, height, width)."""
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def _ran_out(choice: Choice, width: int, height: int, tile: int | None) -> MemoryRanOut:
    """The advice when memory runs out although the estimate fitted."""
    where = "The GPU's memory" if accelerator.has_own_memory(choice.device.type) else "RAM"
    half = max(LEAST_TILE, (tile or max(width, height)) // 2)
    lighter = "" if choice.form.streamed else f"--weights {'streamed' if choice.form.float8 else 'fp8'}, "
    return MemoryRanOut(
        f"{where} ran out while sampling {width} x {height} pixels, although enough was free at the start: close other "
        f"programs, or choose {lighter}--tile {half} or a smaller size."
    )


def _files(path: Path, delta_path: Path | None) -> tuple[Path, Path | None]:
    """The model's file, and the delta to merge into it; the tiny source uses its own by default."""
    base = bundled.resolve(path)
    return base, bundled.DELTA if base == bundled.SOURCE and delta_path is None else delta_path


def _dtype(base: Path, checkpoint: Checkpoint) -> torch.dtype:
    """The compute dtype: that of the stored patch embedder."""
    # The tiny model is stored in bfloat16, in which a CPU is slower and no more accurate.
    return torch.float32 if base == bundled.SOURCE else TORCH_DTYPES[checkpoint.input_dtype]


def _load(opened: Merged, choice: Choice) -> L2PModel:
    if opened.unchanged:
        with byte_progress("checking the base") as checking:
            verify(opened, checking)
    with byte_progress("loading") as progress:
        return sampling_model.load(opened.checkpoint, choice.form, choice.device, progress, opened.adapters)
