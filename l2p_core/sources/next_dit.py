"""The "NextDiT" family: a single-stream transformer over image and caption tokens (Lumina-2, Z-Image).

Sandwich-normed blocks modulated by the timestep, 3-axis rotary positions, refiners for each modality before the joint
blocks (arXiv 2503.21758 section 3; arXiv 2605.12013 section 3.1). `Traits` holds the differences between its members.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..backbone import (
    Backbone,
    Caption,
    Captions,
    Linear,
    RefinedCaptions,
    RMSNorm,
    Runs,
    attended,
    check_count,
    features_of,
    finite,
    runs_of,
)
from ..config import NORM_EPS, ModelConfig
from ..ops.memory_saving import gated_silu
from ..ops.rope import Positions, Rope, caption_rope, joint_rope, rotate
from ..patch import padded_size
from .shape_reader import ShapeReader
from .source import Stack

_LINEARS = ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
NOISE_REFINER = Stack("noise_refiner", "n_refiner_layers", _LINEARS, trunk=False)
CONTEXT_REFINER = Stack("context_refiner", "n_refiner_layers", _LINEARS, trunk=False)
LAYERS = Stack("layers", "n_layers", _LINEARS)
STACKS = (NOISE_REFINER, CONTEXT_REFINER, LAYERS)
"""The blocks of the family, in computing order."""

LANDMARKS = ("x_embedder.weight", "cap_embedder.1.weight", "t_embedder.mlp.0.weight")
EMBEDDERS = ("x_embedder", "t_embedder", "cap_embedder")
MODULATION = "adaLN_modulation"
"""It has a fiftieth of a block's parameters, and its rounding errors would scale whole tokens."""


@dataclass(frozen=True)
class Traits:
    """The differences between the members of the family.

    Attributes:
        time_scale: the timestep embedder reads 1 - sigma times this.
        theta: base of the rotary frequencies.
        token_multiple: captions and images are each padded to a multiple of this many tokens, by learned tokens;
            1 means no padding.
        silu: whether blocks apply SiLU to the timestep embedding.
    """

    time_scale: float
    theta: float
    token_multiple: int
    silu: bool

    def positions(self, config: ModelConfig) -> Positions:
        """The positions of tokens."""
        return Positions(config.rope_dims, self.theta, self.token_multiple)


def sizes(read: ShapeReader) -> dict[str, Any]:
    """Reads the family's sizes beside width, patch and head."""
    t_hidden_dim, t_freq_dim = read.matrix("t_embedder.mlp.0.weight")
    return {
        "head_dim": read["layers.0.attention.q_norm.weight"][0],
        "n_layers": read.count("layers"),
        "n_refiner_layers": read.count("noise_refiner"),
        "caption_dim": read["cap_embedder.0.weight"][0],
        "ffn_dim": read["layers.0.feed_forward.w1.weight"][0],
        "t_freq_dim": t_freq_dim,
        "t_hidden_dim": t_hidden_dim,
        "t_dim": read["t_embedder.mlp.2.weight"][0],
    }


class TimestepEmbedder(nn.Module):
    """1 - sigma, scaled, as sinusoids and a two-layer MLP."""

    def __init__(self, config: ModelConfig, scale: float):
        super().__init__()
        self.scale = scale
        self.freq_dim = config.t_freq_dim
        self.mlp = nn.Sequential(
            nn.Linear(config.t_freq_dim, config.t_hidden_dim),
            nn.SiLU(),
            nn.Linear(config.t_hidden_dim, config.t_dim),
        )

    def forward(self, sigma: Tensor) -> Tensor:
        """(B,) noise levels in [0, 1] -> (B, t_dim). Sinusoids are float32: bfloat16 would merge neighbours."""
        half = self.freq_dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=sigma.device)
        angles = self.scale * (1.0 - sigma.float())[:, None] * torch.exp(-math.log(10000.0) * steps / half)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))


class Attention(nn.Module):
    """Self-attention with RMS-normed queries and keys and rotary positions; heads may share keys and values."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.widths = [config.dim, *[config.n_kv_heads * config.head_dim] * 2]
        self.head_dim = config.head_dim
        self.qkv = Linear(config.dim, sum(self.widths), bias=False)
        self.out = Linear(config.dim, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, eps=NORM_EPS)
        self.k_norm = RMSNorm(config.head_dim, eps=NORM_EPS)

    def forward(self, x: Tensor, rope: Rope, runs: Runs | None) -> Tensor:
        """(B, N, D) -> (B, N, D); `runs` says which tokens exist, None if all do."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x).split(self.widths, dim=-1))
        rope = rope.transpose(1, 2)
        # Heads go before tokens for attention alone: what comes before reads memory in its order.
        q, k, v = (x.transpose(1, 2) for x in (rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope), v))
        if k.shape[1] != q.shape[1]:
            # Laid out for each head: torch's fastest kernels of older versions know no groups.
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        x = F.scaled_dot_product_attention(q, k, v) if runs is None else attended(q, k, v, runs)
        return self.out(rearrange(x, "b h n d -> b n (h d)"))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.w2(finite(gated_silu(self.w1(x), self.w3(x))))


class Block(nn.Module):
    """Attention and SwiGLU between RMS norms before and after; scaled and gated by the timestep if modulated."""

    def __init__(self, config: ModelConfig, modulated: bool = True, silu: bool = False):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm1 = RMSNorm(config.dim, eps=NORM_EPS)
        self.attention_norm2 = RMSNorm(config.dim, eps=NORM_EPS)
        self.ffn_norm1 = RMSNorm(config.dim, eps=NORM_EPS)
        self.ffn_norm2 = RMSNorm(config.dim, eps=NORM_EPS)
        modulation = nn.Linear(config.t_dim, 4 * config.dim) if modulated else None
        # Where SiLU comes first, it takes the number 0 in the keys.
        layers = [nn.SiLU(), modulation] if silu else [modulation]
        self.adaLN_modulation = nn.Sequential(*layers) if modulation else None

    def forward(self, x: Tensor, rope: Rope, runs: Runs | None = None, t: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); `t` (B, t_dim) is the timestep embedding of a modulated block."""
        scale_msa = gate_msa = scale_mlp = gate_mlp = None
        if self.adaLN_modulation is not None:
            assert t is not None, "a modulated block needs the timestep embedding"
            scale_msa, gate_msa, scale_mlp, gate_mlp = self.adaLN_modulation(t)[:, None].chunk(4, dim=-1)
            scale_msa, gate_msa, scale_mlp, gate_mlp = 1 + scale_msa, gate_msa.tanh(), 1 + scale_mlp, gate_mlp.tanh()
        attended = self.attention(self.attention_norm1(x, scale_msa), rope, runs)
        x = x + self.attention_norm2(finite(attended), gate_msa)
        fed = self.feed_forward(self.ffn_norm1(x, scale_mlp))
        return x + self.ffn_norm2(finite(fed), gate_mlp)


class FinalLayer(nn.Module):
    """The source's output projection: hidden states to latent patches."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm_final = nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(config.dim, config.patch_size**2 * config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.t_dim, config.dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, N, D) and (B, t_dim) -> (B, N, P*P*C)."""
        scale = 1 + self.adaLN_modulation(t)[:, None]
        return self.linear(self.norm_final(x) * scale)


class NextDiT(Backbone):
    """Patch embedder, caption and timestep embedders, refiners and joint blocks; no output projection."""

    traits: ClassVar[Traits]

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        silu = self.traits.silu
        self.x_embedder = nn.Linear(config.patch_size**2 * config.in_channels, config.dim)
        self.t_embedder = TimestepEmbedder(config, self.traits.time_scale)
        self.cap_embedder = nn.Sequential(
            RMSNorm(config.caption_dim, eps=NORM_EPS), nn.Linear(config.caption_dim, config.dim)
        )
        if self.traits.token_multiple > 1:
            self.x_pad_token = nn.Parameter(torch.zeros(1, config.dim))
            self.cap_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.noise_refiner = nn.ModuleList(Block(config, silu=silu) for _ in range(config.n_refiner_layers))
        self.context_refiner = nn.ModuleList(Block(config, modulated=False) for _ in range(config.n_refiner_layers))
        self.layers = nn.ModuleList(Block(config, silu=silu) for _ in range(config.n_layers))
        self.positions = self.traits.positions(config)

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        for stack in STACKS:
            for number, block in enumerate(self.get_submodule(stack.name).children()):
                yield f"{stack.name}.{number}", block

    def hidden_states(
        self, patches: Tensor, grid: tuple[int, int], sigma: Tensor, conditioning: Captions
    ) -> tuple[Tensor, Tensor]:
        batch, n_image = patches.shape[:2]
        check_count(conditioning, batch)
        t = self.t_embedder(sigma)
        image = self._padded(self.x_embedder(patches), "x_pad_token")
        lengths = self._lengths(conditioning)
        rope = joint_rope(self.positions, grid, lengths, patches.device)
        for block in self.noise_refiner:
            image = self._run(block, image, rope[:, :, : image.shape[1]], None, t)
        caption = conditioning if isinstance(conditioning, RefinedCaptions) else self._refine(conditioning)

        x = torch.cat([image, caption.tokens], dim=1)
        runs = runs_of(lengths, image.shape[1])
        for number, block in enumerate(self.layers):
            x = self._run_trunk(number, block, x, rope, runs, t)
        return x[:, :n_image], t

    def refined(self, captions: Sequence[Caption]) -> RefinedCaptions:
        return self._refine(captions)

    def _refine(self, captions: Sequence[Caption]) -> RefinedCaptions:
        # Apart from `refined`, which under FSDP2 gathers weights as a call of the model does.
        self._check_captions(captions)
        lengths = self._lengths(captions)
        tokens = self._embed_captions([features_of(caption) for caption in captions], lengths)
        rope = caption_rope(self.positions, max(lengths), tokens.device)
        for block in self.context_refiner:
            tokens = self._run(block, tokens, rope, runs_of(lengths), None)
        return RefinedCaptions(tokens, lengths)

    def _embed_captions(self, captions: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        """Embed each caption and pad it with the learned token to its own length, then all to the longest.

        The second padding exists only in batches of unequal lengths, and no attention reads it.
        """
        longest = max(lengths)
        weight = self.x_embedder.weight
        # One matrix product for the whole batch: captions are short and many.
        stacked = torch.cat([caption.to(weight.device, weight.dtype) for caption in captions])
        embedded = self.cap_embedder(stacked).split([len(caption) for caption in captions])
        padded = [
            F.pad(self._padded(cap[None], "cap_pad_token")[0], (0, 0, 0, longest - length))
            for cap, length in zip(embedded, lengths, strict=True)
        ]
        return torch.stack(padded)

    def _padded(self, tokens: Tensor, pad: str) -> Tensor:
        """Pad tokens (B, N, dim) to the next multiple, if this architecture pads."""
        if self.traits.token_multiple == 1:
            return tokens
        token, missing = getattr(self, pad), self._padded_size(tokens.shape[1]) - tokens.shape[1]
        if not missing and not self.always_pad:
            return tokens
        return torch.cat([tokens, token.to(tokens.dtype).expand(len(tokens), missing, self.config.dim)], dim=1)

    def _padded_size(self, tokens: int) -> int:
        return padded_size(tokens, self.traits.token_multiple)

    def _lengths(self, captions: Captions) -> tuple[int, ...]:
        if isinstance(captions, RefinedCaptions):
            return captions.lengths
        return tuple(self._padded_size(len(features_of(caption))) for caption in captions)
