"""A source that exists in tests alone, as unlike Z-Image as a row allows.

Other key names, two stacks of joint blocks, captions with a pooled vector, captions before the image in the sequence,
channels slowest in a patch, time that rises with noise, and an output that is noise - x0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from comfyui_l2p.l2p_core.backbone import Backbone, Caption, Captions, Conditioning, check_count
from comfyui_l2p.l2p_core.config import VARIANTS, ModelConfig, Sampling
from comfyui_l2p.l2p_core.sources.key_layout import KeyLayout, Stacked
from comfyui_l2p.l2p_core.sources.shape_reader import ShapeReader
from comfyui_l2p.l2p_core.sources.source import Latent, PublishedEncoder, Source, Stack


@dataclass(frozen=True)
class OtherConfig(ModelConfig):
    """Its sizes; `n_layers` counts the first stack."""

    dim: int = 32
    head_dim: int = 16
    n_layers: int = 2
    n_refiner_layers: int = 1
    caption_dim: int = 12
    ffn_dim: int = 48
    t_freq_dim: int = 1
    t_hidden_dim: int = 32
    t_dim: int = 32
    in_channels: int = 4
    source: str = "other"
    n_solos: int = 3
    pooled_dim: int = 6


class OtherBlock(nn.Module):
    def __init__(self, config: OtherConfig, gated: bool):
        super().__init__()
        self.heads = config.n_heads
        self.mix = nn.ModuleDict({"qkv": nn.Linear(config.dim, 3 * config.dim), "o": nn.Linear(config.dim, config.dim)})
        self.tune = nn.Linear(config.dim, config.dim) if gated else None
        self.up, self.down = nn.Linear(config.dim, config.ffn_dim), nn.Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:])
        q, k, v = rearrange(self.mix["qkv"](normed), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        x = x + self.mix["o"](mixed) * (1 if self.tune is None else self.tune(t)[:, None])
        return x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:]))))


class OtherBackbone(Backbone):
    config: OtherConfig

    def __init__(self, config: OtherConfig):
        super().__init__(config)
        self.img_in = nn.Linear(config.patch_size**2 * config.in_channels, config.dim)
        self.txt_in = nn.Linear(config.caption_dim, config.dim)
        self.vector_in = nn.Linear(config.pooled_dim, config.dim)
        self.time_in = nn.Linear(1, config.dim)
        self.pair = nn.ModuleList(OtherBlock(config, gated=True) for _ in range(config.n_layers))
        self.solo = nn.ModuleList(OtherBlock(config, gated=False) for _ in range(config.n_solos))

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        yield from ((f"pair.{i}", block) for i, block in enumerate(self.pair))
        yield from ((f"solo.{i}", block) for i, block in enumerate(self.solo))

    def hidden_states(
        self, patches: Tensor, grid: tuple[int, int], sigma: Tensor, conditioning: Captions
    ) -> tuple[Tensor, Tensor]:
        check_count(conditioning, len(patches))
        assert isinstance(conditioning, Sequence)
        self._check_captions(conditioning)
        image = self.img_in(patches) + _places(grid, self.config.dim).to(patches)
        time = self.time_in(sigma.to(image.dtype)[:, None])
        samples = [self._sample(image[i : i + 1], time[i : i + 1], caption) for i, caption in enumerate(conditioning)]
        hidden, t = zip(*samples, strict=True)
        return torch.cat(hidden), torch.cat(t)

    def _sample(self, image: Tensor, time: Tensor, caption: Caption) -> tuple[Tensor, Tensor]:
        assert isinstance(caption, Conditioning) and caption.pooled is not None
        t = time + self.vector_in(caption.pooled.to(image.dtype)[None])
        x = torch.cat([self.txt_in(caption.features.to(image.dtype))[None], image], dim=1)
        for number, (_, block) in enumerate(self.blocks()):
            x = self._run_trunk(number, block, x, t)
        return x[:, -image.shape[1] :], t


class OtherOutput(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.proj = nn.Linear(config.dim, config.patch_size**2 * config.in_channels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.proj(x * (1 + t[:, None]))


def _places(grid: tuple[int, int], dim: int) -> Tensor:
    rows, columns = (torch.arange(size)[:, None] / 8 + torch.arange(dim) for size in grid)
    return (rows[:, None].sin() + columns[None].cos()).flatten(0, 1)


def _sizes(read: ShapeReader) -> dict[str, Any]:
    return {
        "n_layers": read.count("pair"),
        "n_solos": read.count("solo"),
        "caption_dim": read.matrix("txt_in.weight")[1],
        "pooled_dim": read.matrix("vector_in.weight")[1],
        "ffn_dim": read.matrix("pair.0.up.weight")[0],
    }


_LINEARS = ("mix.qkv", "mix.o", "up", "down")

OTHER = Source(
    name="other",
    title="Other",
    config=OtherConfig,
    sizes=_sizes,
    backbone=OtherBackbone,
    projection=OtherOutput,
    marks=("img_in.weight", "vector_in.weight"),
    landmarks=("img_in.weight",),
    layout=KeyLayout(
        pairs=(
            ("img_in.{}", "patches_of_{patch}.{}"),
            ("pair.{}.mix.o.{}", "twins.{}.out.{}"),
            ("pair.{}", "twins.{}"),
        ),
        stacked=(Stacked("pair.{}.mix.qkv.weight", ("twins.{}.q.weight", "twins.{}.k.weight", "twins.{}.v.weight")),),
    ),
    embedder="img_in",
    output="img_out",
    stacks=(Stack("pair", "n_layers", _LINEARS), Stack("solo", "n_solos", _LINEARS)),
    trained=("img_in", "txt_in", "vector_in", "time_in"),
    encoder=PublishedEncoder("a text encoder with a pooled output", "Other", "other", max_tokens=7, template="say {}"),
    sampling=dict.fromkeys(VARIANTS, Sampling(steps=3, cfg=1.5, shift=2.0)),
    latent=Latent(order="c p q", sign=1),
    never_8_bit=("tune",),
)
