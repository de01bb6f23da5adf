"""The Z-Image backbone: a single-stream transformer over image and caption tokens.

Lumina-2's "NextDiT" as Z-Image uses it (arXiv 2605.12013 section 3.1): sandwich-normed blocks modulated by the
timestep, 3-axis rotary positions, refiners for each modality before the joint blocks. Parameter names are the
ComfyUI layout, so a state dict of these modules is a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import NORM_EPS, ROPE_THETA, TOKEN_MULTIPLE, ModelConfig
from .lean_steps import GatedSilu, ScaledNorm
from .patch import padded_size

Rope = Tensor
"""Rotations as complex numbers, (B or 1, 1, tokens, head_dim / 2), complex64."""


class TimestepEmbedder(nn.Module):
    """1 - sigma, in thousandths, as sinusoids and a two-layer MLP."""

    def __init__(self, config: ModelConfig):
        super().__init__()
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
        angles = 1000.0 * (1.0 - sigma.float())[:, None] * torch.exp(-math.log(10000.0) * steps / half)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))


class RMSNorm(nn.RMSNorm):
    """RMS norm in the dtype of its input, so that float32 master weights do not widen a bfloat16 residual stream."""

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """Normalise the last dimension of (B, ..., N, D); times `factor` (B, 1, D) if there is one."""
        return ScaledNorm.apply(x, self.weight, factor, self.eps)


class Attention(nn.Module):
    """Self-attention with RMS-normed queries and keys and rotary positions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, eps=NORM_EPS)
        self.k_norm = RMSNorm(config.head_dim, eps=NORM_EPS)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
        """(B, N, D) -> (B, N, D); `mask` (B, 1, 1, N) is true for the keys that exist, None if all do."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.n_heads)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(rearrange(x, "b h n d -> b n (h d)"))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.w2(_finite(GatedSilu.apply(self.w1(x), self.w3(x))))


class Block(nn.Module):
    """Attention and SwiGLU between RMS norms before and after; scaled and gated by the timestep if modulated."""

    def __init__(self, config: ModelConfig, modulated: bool = True):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm1 = RMSNorm(config.dim, eps=NORM_EPS)
        self.attention_norm2 = RMSNorm(config.dim, eps=NORM_EPS)
        self.ffn_norm1 = RMSNorm(config.dim, eps=NORM_EPS)
        self.ffn_norm2 = RMSNorm(config.dim, eps=NORM_EPS)
        self.adaLN_modulation = nn.Sequential(nn.Linear(config.t_dim, 4 * config.dim)) if modulated else None

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); `t` (B, t_dim) is the timestep embedding of a modulated block."""
        scale_msa = gate_msa = scale_mlp = gate_mlp = None
        if self.adaLN_modulation is not None:
            assert t is not None, "a modulated block needs the timestep embedding"
            scale_msa, gate_msa, scale_mlp, gate_mlp = self.adaLN_modulation(t)[:, None].chunk(4, dim=-1)
            scale_msa, gate_msa, scale_mlp, gate_mlp = 1 + scale_msa, gate_msa.tanh(), 1 + scale_mlp, gate_mlp.tanh()
        attended = self.attention(self.attention_norm1(x, scale_msa), rope, mask)
        x = x + self.attention_norm2(_finite(attended), gate_msa)
        fed = self.feed_forward(self.ffn_norm1(x, scale_mlp))
        return x + self.ffn_norm2(_finite(fed), gate_mlp)


class Backbone(nn.Module):
    """Patch embedder, caption and timestep embedders, refiners and joint blocks; no output projection.

    `gradient_checkpointing` recomputes each block (and, in L2PModel, each stage of the head) in the backward pass, but
    for the joint blocks whose numbers are in `kept`.
    `always_pad` gives the pad tokens a gradient, of zeros, where no padding is needed.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.kept: frozenset[int] = frozenset()
        self.always_pad = False
        patch_numel = config.patch_size**2 * config.in_channels
        self.x_embedder = nn.Linear(patch_numel, config.dim)
        self.t_embedder = TimestepEmbedder(config)
        self.cap_embedder = nn.Sequential(
            RMSNorm(config.caption_dim, eps=NORM_EPS), nn.Linear(config.caption_dim, config.dim)
        )
        self.x_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.noise_refiner = nn.ModuleList(Block(config) for _ in range(config.n_refiner_layers))
        self.context_refiner = nn.ModuleList(Block(config, modulated=False) for _ in range(config.n_refiner_layers))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))

    def hidden_states(
        self, patches: Tensor, grid: tuple[int, int], sigma: Tensor, captions: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run the backbone.

        Args:
            patches: (B, rows * columns, P*P*C), see `patch.patchify`.
            grid: the token grid as (rows, columns).
            sigma: (B,) noise levels in [0, 1].
            captions: B tensors (L_i, caption_dim); lengths may differ, each sample equals running it alone.

        Returns:
            The last block's raw hidden states of the image tokens (B, rows * columns, dim), and the timestep
            embedding (B, t_dim).

        Raises:
            ValueError: if there are not as many captions as images, or a caption has the wrong width.
        """
        batch, n_image = patches.shape[:2]
        self._check_captions(captions, batch)
        device = patches.device
        t = self.t_embedder(sigma)

        length = padded_size(n_image, TOKEN_MULTIPLE)
        image = pad_tokens(self.x_embedder(patches), self.x_pad_token, length, self.always_pad)
        cap_lengths = [padded_size(len(caption), TOKEN_MULTIPLE) for caption in captions]
        cap, cap_mask = self._embed_captions(captions, cap_lengths)
        image_rope, cap_rope = _rope_of(self.config.rope_dims, grid, tuple(cap_lengths), device)

        for block in self.noise_refiner:
            image = self._run(block, image, image_rope, None, t)
        for block in self.context_refiner:
            cap = self._run(block, cap, cap_rope, cap_mask, None)

        x = torch.cat([image, cap], dim=1)
        rope = _joined(image_rope, cap_rope)
        mask = None if cap_mask is None else F.pad(cap_mask, (image.shape[1], 0), value=True)
        for number, block in enumerate(self.layers):
            run = block if number in self.kept else partial(self._run, block)
            x = run(x, rope, mask, t)
        return x[:, :n_image], t

    def _run(self, block: nn.Module, x: Tensor, rope: Rope, mask: Tensor | None, t: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, rope, mask, t, use_reentrant=False, preserve_rng_state=False)
        return block(x, rope, mask, t)

    def _embed_captions(self, captions: Sequence[Tensor], lengths: list[int]) -> tuple[Tensor, Tensor | None]:
        """Embed each caption and pad it with the learned token to its own length, then all to the longest.

        The second padding exists only in batches of unequal lengths and is masked out of every attention.
        """
        longest = max(lengths)
        dtype, device = self.cap_pad_token.dtype, self.cap_pad_token.device
        # One matrix product for the whole batch: captions are short and many.
        stacked = torch.cat([caption.to(device, dtype) for caption in captions])
        embedded = self.cap_embedder(stacked).split([len(caption) for caption in captions])
        padded = [
            F.pad(pad_tokens(cap[None], self.cap_pad_token, length, self.always_pad)[0], (0, 0, 0, longest - length))
            for cap, length in zip(embedded, lengths, strict=True)
        ]
        if min(lengths) == longest:
            return torch.stack(padded), None
        real = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        return torch.stack(padded), real[:, None, None, :]

    def _check_captions(self, captions: Sequence[Tensor], batch: int) -> None:
        if len(captions) != batch:
            raise ValueError(f"{batch} images came with {len(captions)} captions; give one caption for each image.")
        for caption in captions:
            if caption.ndim != 2 or len(caption) == 0 or caption.shape[1] != self.config.caption_dim:
                raise ValueError(
                    f"Caption features have the shape {tuple(caption.shape)}, but this model takes (tokens, "
                    f"{self.config.caption_dim}): use the text encoder that belongs to it."
                )


def pad_tokens(tokens: Tensor, pad_token: Tensor, length: int, always: bool = False) -> Tensor:
    """Extend (B, N, D) to (B, length, D) with a learned (1, D) token; `always` depends on it even if N is length."""
    batch, n, dim = tokens.shape
    if n == length and not always:
        return tokens
    return torch.cat([tokens, pad_token.to(tokens.dtype).expand(batch, length - n, dim)], dim=1)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate interleaved channel pairs of (B, heads, N, head_dim) by each token's angles, in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope).flatten(-2).to(x.dtype)


@lru_cache(maxsize=16)
def _rope_of(
    dims: tuple[int, int, int], grid: tuple[int, int], cap_lengths: tuple[int, ...], device: torch.device
) -> tuple[Rope, Rope]:
    """Rotary tables of the image tokens and of the caption tokens; kept, since every step asks for the same.

    Caption token i sits at (1 + i, 0, 0); image token (row, column) at (caption length + 1, row, column), so
    image tables differ between samples whose captions have different padded lengths; image pads sit at the origin.
    """
    rows, columns = grid
    n_image = rows * columns
    # Tables made under a host's inference mode could not be used in training later.
    with torch.inference_mode(False), torch.no_grad():
        cap_positions = torch.zeros(1, max(cap_lengths), 3, dtype=torch.float64)
        cap_positions[0, :, 0] = torch.arange(1, max(cap_lengths) + 1)
        distinct = sorted(set(cap_lengths))
        positions = torch.zeros(len(distinct), padded_size(n_image, TOKEN_MULTIPLE), 3, dtype=torch.float64)
        positions[:, :n_image, 0] = torch.tensor(distinct, dtype=torch.float64)[:, None] + 1
        positions[:, :n_image, 1] = torch.arange(rows).repeat_interleave(columns)
        positions[:, :n_image, 2] = torch.arange(columns).repeat(rows)
        of_sample = torch.tensor([distinct.index(n) for n in cap_lengths])
        image = _rotations(positions, dims)
        if len(distinct) > 1:
            image = image[of_sample]
        return image.to(device), _rotations(cap_positions, dims).to(device)


def _joined(image: Rope, cap: Rope) -> Rope:
    """Tables of the joint sequence [image, caption]."""
    return torch.cat([image, cap.expand(len(image), -1, -1, -1)], dim=2)


def _rotations(positions: Tensor, dims: tuple[int, int, int]) -> Rope:
    """Of (B, N, 3) positions; angles are computed in float64."""
    angles = []
    for axis, dim in enumerate(dims):
        frequencies = ROPE_THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(positions[..., axis, None] * frequencies)
    joined = torch.cat(angles, dim=-1)[:, None]
    return torch.polar(torch.ones_like(joined), joined).to(torch.complex64)


def _finite(x: Tensor) -> Tensor:
    """Large activations overflow float16; clamp them to its range as the host does (comfy/ldm/lumina/model.py)."""
    if x.dtype == torch.float16:
        return torch.nan_to_num(x, nan=0.0, posinf=65504.0, neginf=-65504.0)
    return x
