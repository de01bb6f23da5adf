"""Sizes of a model, read off the shapes in its checkpoint, and the table of L2P variants.

Checkpoints of Z-Image and L2P carry no configuration, so every size (width, depth, patch, caption width, head
channels) comes from tensor shapes. Sources: arXiv 2605.12013 section 3; the ultra-high-resolution variants are
those of the published L2P-ZImage-HR extension.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .ranges import HEAD_WIDTH

PIXEL_CHANNELS = 3
LATENT_PATCH = 2
ROPE_THETA = 256.0
NORM_EPS = 1e-5
TOKEN_MULTIPLE = 32
"""Captions and image tokens are each padded to a multiple of this many tokens."""
COMFY_PREFIX = "model.diffusion_model."

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Stage:
    """One resolution of the Detailer Head: output channels of its encoder and of its two decoder convolutions."""

    name: str
    enc: int
    up: int
    dec: int


@dataclass(frozen=True)
class HeadConfig:
    """The Detailer Head's sizes; ``stages`` run from full resolution down, each halving the grid."""

    stages: tuple[Stage, ...]
    bottleneck: int

    @property
    def stride(self) -> int:
        """Pixels per bottleneck cell."""
        return 2 ** len(self.stages)

    def scaled(self, factor: float) -> HeadConfig:
        """The same head with every width multiplied by `factor`; skips of 3 channels or fewer stay as they are."""

        def scale(channels: int) -> int:
            return channels if channels <= PIXEL_CHANNELS else max(1, round(channels * factor))

        stages = tuple(Stage(s.name, scale(s.enc), scale(s.up), scale(s.dec)) for s in self.stages)
        return HeadConfig(stages, scale(self.bottleneck))


@dataclass(frozen=True)
class Variant:
    """A published L2P geometry with its published sampling settings; `pixels` is the side it was trained at."""

    name: str
    patch_size: int
    head: HeadConfig
    pixels: int
    steps: int
    cfg: float
    shift: float = 3.0


_STAGES_1K = (
    Stage("1", 64, 64, 64),
    Stage("2", 128, 128, 64),
    Stage("3", 256, 256, 128),
    Stage("4", 512, 512, 256),
)
_STAGES_4K = (Stage("0", 16, 16, 16), Stage("0b", 32, 32, 16), Stage("1", 64, 64, 32), *_STAGES_1K[1:])
_STAGES_8K = (Stage("_8k", 3, 16, 16), *_STAGES_4K)
_STAGES_10K = (
    Stage("_10k_a", 3, 16, 16),
    *_STAGES_4K[:4],
    Stage("3", 256, 256, 128),
)

VARIANTS: dict[str, Variant] = {
    "1k": Variant("1k", 16, HeadConfig(_STAGES_1K, 512), pixels=1024, steps=30, cfg=2.0),
    "4k": Variant("4k", 64, HeadConfig(_STAGES_4K, 512), pixels=4096, steps=50, cfg=4.0),
    "8k": Variant("8k", 128, HeadConfig(_STAGES_8K, 512), pixels=8192, steps=50, cfg=4.0),
    "10k": Variant("10k", 160, HeadConfig(_STAGES_10K, 512), pixels=10240, steps=50, cfg=4.0),
}


@dataclass(frozen=True)
class ModelConfig:
    """Every size of an L2P model, or of a latent source where `head` is None.

    The defaults are those of the 6B Z-Image (arXiv 2605.12013 section 4.1) as its latent source.
    """

    patch_size: int = LATENT_PATCH
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
    variant: str | None = None
    head: HeadConfig | None = None

    @property
    def n_heads(self) -> int:
        """Attention heads."""
        return self.dim // self.head_dim

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Channels of a head given to the three RoPE axes: (caption position, row, column)."""
        return self.head_dim // 4, 3 * self.head_dim // 8, 3 * self.head_dim // 8

    @property
    def size_multiple(self) -> int:
        """Heights and widths are padded to a multiple of this many pixels (latent cells for a source)."""
        return math.lcm(self.patch_size, self.head.stride if self.head else 1)

    def with_head(self, variant: str, head_width: float = 1.0) -> ModelConfig:
        """This backbone as a pixel model of `variant`, its head's widths multiplied by `head_width`.

        Raises:
            ValueError: for a variant that does not exist, or a width outside `ranges.HEAD_WIDTH`.
        """
        row = variant_row(variant)
        HEAD_WIDTH.check("head_width", head_width)
        return dataclasses.replace(
            self,
            patch_size=row.patch_size,
            in_channels=PIXEL_CHANNELS,
            variant=variant,
            head=row.head.scaled(head_width),
        )

    def to_json(self) -> str:
        """The configuration as JSON text, as kept in the metadata of the files we write."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> ModelConfig:
        """Read the configuration off a checkpoint's shapes, in ComfyUI or diffusers layout, prefix or none.

        Raises:
            ValueError: if the keys are not those of a Z-Image or L2P model, or its shapes contradict each other.
        """
        prefix = COMFY_PREFIX if any(key.startswith(COMFY_PREFIX) for key in shapes) else ""
        read = _ShapeReader({key.removeprefix(prefix): tuple(shape) for key, shape in shapes.items()})
        head = read.head()
        dim, patch_numel = read.patch_embedder()
        if head:
            variant = _variant_of(head)
            patch_size, in_channels = VARIANTS[variant].patch_size, PIXEL_CHANNELS
        else:
            variant = None
            patch_size, in_channels = LATENT_PATCH, patch_numel // LATENT_PATCH**2
        if patch_size**2 * in_channels != patch_numel:
            raise ValueError(
                f"The patch embedder takes {patch_numel} values a patch, but a "
                f"{variant or 'latent'} model takes {patch_size**2 * in_channels}: this is not an L2P or Z-Image file."
            )
        config = cls(
            patch_size=patch_size,
            in_channels=in_channels,
            dim=dim,
            head_dim=read.either("layers.0.attention.q_norm.weight", "layers.0.attention.norm_q.weight")[0],
            n_layers=read.count("layers"),
            n_refiner_layers=read.count("noise_refiner"),
            caption_dim=read["cap_embedder.0.weight"][0],
            ffn_dim=read["layers.0.feed_forward.w1.weight"][0],
            t_freq_dim=read.matrix("t_embedder.mlp.0.weight")[1],
            t_hidden_dim=read.matrix("t_embedder.mlp.0.weight")[0],
            t_dim=read["t_embedder.mlp.2.weight"][0],
            variant=variant,
            head=head,
        )
        if config.head_dim == 0 or config.dim % config.head_dim or config.head_dim % 16:
            raise ValueError(
                f"Width {config.dim} with attention heads of {config.head_dim} is not a Z-Image backbone: "
                "heads must divide the width and be a multiple of 16."
            )
        return config


def variant_row(variant: str) -> Variant:
    """The table row of a variant; a ValueError naming the known ones for any other word."""
    if variant not in VARIANTS:
        raise ValueError(f"There is no L2P variant {variant!r}; choose one of {', '.join(VARIANTS)}.")
    return VARIANTS[variant]


def _variant_of(head: HeadConfig) -> str:
    names = [stage.name for stage in head.stages]
    for row in VARIANTS.values():
        if names == [stage.name for stage in row.head.stages]:
            return row.name
    raise ValueError(
        f"The Detailer Head has the stages {', '.join(names)}, which no known variant ({', '.join(VARIANTS)}) has."
    )


class _ShapeReader:
    """Looks shapes up by key and turns a missing one into a sentence."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.shapes = shapes

    def __getitem__(self, key: str) -> tuple[int, ...]:
        if not self.shapes.get(key):
            raise ValueError(f"This is not a Z-Image or L2P model: it has no '{key}'.")
        return self.shapes[key]

    def either(self, comfy_key: str, diffusers_key: str) -> tuple[int, ...]:
        return self[comfy_key if comfy_key in self.shapes else diffusers_key]

    def matrix(self, key: str) -> tuple[int, int]:
        shape = self[key]
        if len(shape) != 2:
            raise ValueError(f"'{key}' has the shape {shape}, but a matrix was expected.")
        return shape[0], shape[1]

    def patch_embedder(self) -> tuple[int, int]:
        for key in self.shapes:
            if key == "x_embedder.weight" or (key.startswith("all_x_embedder.") and key.endswith(".weight")):
                return self.matrix(key)
        raise ValueError("This is not a Z-Image or L2P model: it has no patch embedder ('x_embedder.weight').")

    def count(self, stack: str) -> int:
        """How many blocks `stack` has; block numbers must run from 0 without a gap."""
        prefix = f"{stack}."
        found = {key[len(prefix) :].partition(".")[0] for key in self.shapes if key.startswith(prefix)}
        if found != {str(i) for i in range(len(found))}:
            raise ValueError(f"The blocks of '{stack}' are not numbered 0 to {len(found) - 1}: the file is incomplete.")
        return len(found)

    def head(self) -> HeadConfig | None:
        """The Detailer Head's widths, or None for a latent model."""
        prefix, suffix = "local_decoder.enc", ".0.weight"
        names = [
            key[len(prefix) : -len(suffix)] for key in self.shapes if key.startswith(prefix) and key.endswith(suffix)
        ]
        if not names:
            return None
        order = [stage.name for row in VARIANTS.values() for stage in row.head.stages]
        unknown = [name for name in names if name not in order]
        if unknown:
            raise ValueError(f"The Detailer Head has an unknown stage 'enc{unknown[0]}'; this build cannot read it.")
        full_resolution_first = ["_8k", "_10k_a", "0", "0b", "1", "2", "3", "4"]
        stages = tuple(
            Stage(
                name,
                enc=self[f"local_decoder.enc{name}.0.weight"][0],
                up=self[f"local_decoder.up{name}.1.weight"][0],
                dec=self[f"local_decoder.dec{name}.0.weight"][0],
            )
            for name in sorted(names, key=full_resolution_first.index)
        )
        return HeadConfig(stages, bottleneck=self["local_decoder.bottleneck.0.weight"][0])
