"""Sizes of a model, and the table of L2P variants.

Sources: arXiv 2605.12013 section 3; the ultra-high-resolution variants are those of the published L2P-ZImage-HR
extension. What is true of one architecture alone is in its file in `sources`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from functools import cache
from typing import TYPE_CHECKING

from .ranges import HEAD_WIDTH, check_known

PIXEL_CHANNELS = 3
NORM_EPS = 1e-5
HEAD = "local_decoder"
"""Prefix of the Detailer Head's keys."""
COMFY_PREFIX = "model.diffusion_model."

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class HeadStage:
    """One resolution of the Detailer Head: output channels of its encoder and of its two decoder convolutions."""

    name: str
    enc: int
    up: int
    dec: int


@dataclass(frozen=True)
class HeadConfig:
    """The Detailer Head's sizes; ``stages`` run from full resolution down, each halving the grid."""

    stages: tuple[HeadStage, ...]
    bottleneck: int

    @property
    def stride(self) -> int:
        """Pixels per bottleneck cell."""
        return 2 ** len(self.stages)

    def scaled(self, factor: float) -> HeadConfig:
        """The same head with every width multiplied by `factor`; skips of 3 channels or fewer stay as they are."""

        def scale(channels: int) -> int:
            return channels if channels <= PIXEL_CHANNELS else max(1, round(channels * factor))

        stages = tuple(HeadStage(s.name, scale(s.enc), scale(s.up), scale(s.dec)) for s in self.stages)
        return HeadConfig(stages, scale(self.bottleneck))


@dataclass(frozen=True)
class Sampling:
    """Published sampling settings: Euler steps, guidance, and the shift of the noise levels."""

    steps: int
    cfg: float
    shift: float = 3.0


@dataclass(frozen=True, kw_only=True)
class Variant(Sampling):
    """A published L2P geometry with Z-Image's sampling settings; `pixels` is the side of the images it was trained
    on."""

    name: str
    patch_size: int
    head: HeadConfig
    pixels: int


_STAGES_1K = (
    HeadStage("1", 64, 64, 64),
    HeadStage("2", 128, 128, 64),
    HeadStage("3", 256, 256, 128),
    HeadStage("4", 512, 512, 256),
)
_STAGES_4K = (HeadStage("0", 16, 16, 16), HeadStage("0b", 32, 32, 16), HeadStage("1", 64, 64, 32), *_STAGES_1K[1:])
_STAGES_8K = (HeadStage("_8k", 3, 16, 16), *_STAGES_4K)
_STAGES_10K = (
    HeadStage("_10k_a", 3, 16, 16),
    *_STAGES_4K[:4],
    HeadStage("3", 256, 256, 128),
)

VARIANTS: dict[str, Variant] = {
    "1k": Variant(name="1k", patch_size=16, head=HeadConfig(_STAGES_1K, 512), pixels=1024, steps=30, cfg=2.0),
    "4k": Variant(name="4k", patch_size=64, head=HeadConfig(_STAGES_4K, 512), pixels=4096, steps=50, cfg=4.0),
    "8k": Variant(name="8k", patch_size=128, head=HeadConfig(_STAGES_8K, 512), pixels=8192, steps=50, cfg=4.0),
    "10k": Variant(name="10k", patch_size=160, head=HeadConfig(_STAGES_10K, 512), pixels=10240, steps=50, cfg=4.0),
}


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a backbone: of a latent source or, as `PixelConfig`, of a pixel model.

    The defaults are those of the 6B Z-Image (arXiv 2605.12013 section 4.1) as its latent source. Another architecture
    has a subclass with its own defaults and additional sizes.
    """

    patch_size: int = 2
    in_channels: int = 16
    dim: int = 3840
    head_dim: int = 128
    n_layers: int = 30
    n_refiner_layers: int = 2
    caption_dim: int = 2560
    ffn_dim: int = 10240
    t_freq_dim: int = 256
    t_hidden_dim: int = 1024
    t_dim: int = 256
    source: str = "z-image"
    """The architecture, a name of `sources.SOURCES`."""

    if not TYPE_CHECKING:  # type checkers ask for a `PixelConfig`; readers of version 0.1 find None in a latent source
        variant = head = None

    @property
    def n_heads(self) -> int:
        """Attention heads."""
        return self.dim // self.head_dim

    @property
    def n_kv_heads(self) -> int:
        """Heads of keys and values, each read by as many heads of queries; here by one."""
        return self.n_heads

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Channels of a head given to the three RoPE axes: (caption position, row, column)."""
        return self.head_dim // 4, 3 * self.head_dim // 8, 3 * self.head_dim // 8

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled vector that comes with a caption's features; 0 if there is none."""
        return 0

    @property
    def size_multiple(self) -> int:
        """Heights and widths are padded to a multiple of this many latent cells, or pixels."""
        return self.patch_size

    def with_head(self, variant: str, head_width: float = 1.0) -> PixelConfig:
        """This backbone as a pixel model of `variant`, its head's widths multiplied by `head_width`.

        Raises:
            ValueError: for a variant that does not exist, or a width outside `ranges.HEAD_WIDTH`.
        """
        row = variant_row(variant)
        HEAD_WIDTH.check("head_width", head_width)
        return self.of_pixels(row, row.head.scaled(head_width))

    def of_pixels(self, variant: Variant, head: HeadConfig) -> PixelConfig:
        """This backbone as a pixel model of `variant` with a head of these sizes."""
        kind: type = type(self)
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        pixels = {"patch_size": variant.patch_size, "in_channels": PIXEL_CHANNELS}
        return _pixel_type(kind)(**own | pixels | {"variant": variant.name, "head": head})

    def to_json(self) -> str:
        """The configuration as JSON text, as kept in the metadata of the files we write."""
        stated = dataclasses.asdict(self) | ({} if isinstance(self, PixelConfig) else {"variant": None, "head": None})
        if self.source == ModelConfig.source:
            del stated["source"]  # files of this one are the same, byte for byte, as before there were others
        return json.dumps(stated, separators=(",", ":"))

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> ModelConfig:
        """Read the configuration off a checkpoint's shapes, in ComfyUI or diffusers layout, prefix or none.

        Returns:
            A `PixelConfig` if there is a Detailer Head.

        Raises:
            ValueError: if the keys are not those of a known source or L2P model, or its shapes contradict each other.
        """
        # Here, since the sources' own files build on this one.
        from .sources.recognition import read_config

        return read_config(shapes)


@dataclass(frozen=True)
class PixelConfig(ModelConfig):
    """The sizes of a pixel model: those of its backbone, its variant and its Detailer Head's."""

    variant: str = field(kw_only=True)
    head: HeadConfig = field(kw_only=True)

    @property
    def size_multiple(self) -> int:
        """Heights and widths are padded to a multiple of this many pixels."""
        return math.lcm(self.patch_size, self.head.stride)


@cache
def _pixel_type(kind: type) -> type[PixelConfig]:
    """The type of a source's pixel models: a `PixelConfig` with the additional fields of the source's own type."""
    if issubclass(kind, PixelConfig):
        return kind
    if kind is ModelConfig:
        return PixelConfig
    return make_dataclass(f"Pixel{kind.__name__}", [], bases=(PixelConfig, kind), frozen=True)


def variant_row(variant: str) -> Variant:
    """The table row of a variant; a ValueError naming the known ones for any other word."""
    check_known("L2P variant", variant, VARIANTS)
    return VARIANTS[variant]
