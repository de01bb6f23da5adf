"""The Z-Image backbone: a single-stream transformer over image and caption tokens.

Lumina-2's "NextDiT" as Z-Image uses it (arXiv 2605.12013 section 3.1): sandwich-normed blocks modulated by the
timestep, 3-axis rotary positions, refiners for each modality before the joint blocks. Parameter names are the
ComfyUI layout, so a state dict of these modules is a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import NORM_EPS, TOKEN_MULTIPLE, ModelConfig
from .ops.memory_saving import gated_silu, scaled_norm
from .ops.precision import LACKED, computed_in, product
from .ops.rope import Rope, caption_rope, joint_rope, rotate
from .patch import padded_size

Runs = tuple[tuple[int, int], ...]
"""A batch of sequences of several lengths, padded to the longest: (samples, tokens of each) of neighbours that are
equally long."""


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
        assert self.eps is not None
        return scaled_norm(x, self.weight, factor, self.eps)


class Linear(nn.Linear):
    """A linear layer that without gradients does not compute in a dtype that the CPU lacks."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        dtype = computed_in(x)
        if not LACKED.get(dtype, False):
            return super().forward(x)
        return product(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


class Attention(nn.Module):
    """Self-attention with RMS-normed queries and keys and rotary positions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = Linear(config.dim, 3 * config.dim, bias=False)
        self.out = Linear(config.dim, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, eps=NORM_EPS)
        self.k_norm = RMSNorm(config.head_dim, eps=NORM_EPS)

    def forward(self, x: Tensor, rope: Rope, runs: Runs | None) -> Tensor:
        """(B, N, D) -> (B, N, D); `runs` says which tokens exist, None if all do."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b n h d", three=3, h=self.n_heads)
        rope = rope.transpose(1, 2)
        # Heads go before tokens for attention alone: what comes before reads memory in its order.
        q, k, v = (x.transpose(1, 2) for x in (rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope), v))
        x = F.scaled_dot_product_attention(q, k, v) if runs is None else _attended(q, k, v, runs)
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
        return self.w2(_finite(gated_silu(self.w1(x), self.w3(x))))


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

    def forward(self, x: Tensor, rope: Rope, runs: Runs | None = None, t: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); `t` (B, t_dim) is the timestep embedding of a modulated block."""
        scale_msa = gate_msa = scale_mlp = gate_mlp = None
        if self.adaLN_modulation is not None:
            assert t is not None, "a modulated block needs the timestep embedding"
            scale_msa, gate_msa, scale_mlp, gate_mlp = self.adaLN_modulation(t)[:, None].chunk(4, dim=-1)
            scale_msa, gate_msa, scale_mlp, gate_mlp = 1 + scale_msa, gate_msa.tanh(), 1 + scale_mlp, gate_mlp.tanh()
        attended = self.attention(self.attention_norm1(x, scale_msa), rope, runs)
        x = x + self.attention_norm2(_finite(attended), gate_msa)
        fed = self.feed_forward(self.ffn_norm1(x, scale_mlp))
        return x + self.ffn_norm2(_finite(fed), gate_mlp)


@dataclass(frozen=True)
class RefinedCaptions:
    """Captions as the joint blocks read them, which depends on neither image nor noise level.

    Attributes:
        tokens: (B, longest, dim).
        lengths: of each caption, padded to a multiple of `TOKEN_MULTIPLE`.
    """

    tokens: Tensor
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)


Captions = Sequence[Tensor] | RefinedCaptions


class Backbone(nn.Module):
    """Patch embedder, caption and timestep embedders, refiners and joint blocks; no output projection.

    `gradient_checkpointing` recomputes each block (and, in L2PModel, each stage of the head) in the backward pass, but
    for the joint blocks whose numbers are in `kept`.
    `always_pad` gives the pad tokens a gradient, of zeros, where no padding is needed.
    `read_part` is set while weights are on the device "meta": it reads those of one module of the model, whose name it
    is told as well.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.kept: frozenset[int] = frozenset()
        self.always_pad = False
        self.read_part: Callable[[nn.Module, str], None] | None = None
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
        self, patches: Tensor, grid: tuple[int, int], sigma: Tensor, captions: Captions
    ) -> tuple[Tensor, Tensor]:
        """Run the backbone.

        Args:
            patches: (B, rows * columns, P*P*C), see `patch.patchify`.
            grid: the token grid as (rows, columns).
            sigma: (B,) noise levels in [0, 1].
            captions: B tensors (L_i, caption_dim), or what `refined` made of them; lengths may differ, each sample
                equals running it alone.

        Returns:
            The last block's raw hidden states of the image tokens (B, rows * columns, dim), and the timestep
            embedding (B, t_dim).

        Raises:
            ValueError: if there are not as many captions as images, or a caption has the wrong width.
        """
        batch, n_image = patches.shape[:2]
        self._check_count(captions, batch)
        axes, device = self.config.rope_dims, patches.device
        t = self.t_embedder(sigma)
        image = pad_tokens(
            self.x_embedder(patches), self.x_pad_token, padded_size(n_image, TOKEN_MULTIPLE), self.always_pad
        )
        lengths = _padded_lengths(captions)
        rope = joint_rope(axes, grid, lengths, device)
        for block in self.noise_refiner:
            image = self._run(block, image, rope[:, :, : image.shape[1]], None, t)
        caption = captions if isinstance(captions, RefinedCaptions) else self._refine(captions)

        x = torch.cat([image, caption.tokens], dim=1)
        runs = _runs(lengths, image.shape[1])
        for number, block in enumerate(self.layers):
            run = block if number in self.kept else partial(self._run, block)
            x = run(x, rope, runs, t)
        return x[:, :n_image], t

    def refined(self, captions: Sequence[Tensor]) -> RefinedCaptions:
        """Embed and refine captions, once for all the steps that read them; arguments as for `hidden_states`."""
        return self._refine(captions)

    def _refine(self, captions: Sequence[Tensor]) -> RefinedCaptions:
        # Apart from `refined`, which under FSDP2 gathers weights as a call of the model does.
        self._check_captions(captions)
        lengths = _padded_lengths(captions)
        tokens = self._embed_captions(captions, lengths)
        rope = caption_rope(self.config.rope_dims, max(lengths), tokens.device)
        for block in self.context_refiner:
            tokens = self._run(block, tokens, rope, _runs(lengths), None)
        return RefinedCaptions(tokens, lengths)

    def _run(self, block: nn.Module, x: Tensor, rope: Rope, runs: Runs | None, t: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, rope, runs, t, use_reentrant=False, preserve_rng_state=False)
        return block(x, rope, runs, t)

    def _embed_captions(self, captions: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        """Embed each caption and pad it with the learned token to its own length, then all to the longest.

        The second padding exists only in batches of unequal lengths, and no attention reads it.
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
        return torch.stack(padded)

    @staticmethod
    def _check_count(captions: Captions, batch: int) -> None:
        if len(captions) != batch:
            raise ValueError(f"{batch} images came with {len(captions)} captions; give one caption for each image.")

    def _check_captions(self, captions: Sequence[Tensor]) -> None:
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


def _padded_lengths(captions: Captions) -> tuple[int, ...]:
    if isinstance(captions, RefinedCaptions):
        return captions.lengths
    return tuple(padded_size(len(caption), TOKEN_MULTIPLE) for caption in captions)


def _runs(lengths: Sequence[int], before: int = 0) -> Runs | None:
    """Of sequences of these lengths behind `before` tokens that all have; None if all are equally long."""
    if min(lengths) == max(lengths):
        return None
    return tuple((len(list(run)), before + length) for length, run in groupby(lengths))


def _attended(q: Tensor, k: Tensor, v: Tensor, runs: Runs) -> Tensor:
    """Attention of (B, heads, N, head_dim) within the tokens that exist; zero for the others.

    A call for each run: torch's fastest kernels take no mask.
    """
    counts = [count for count, _ in runs]
    parts = [
        F.pad(F.scaled_dot_product_attention(*(x[:, :, :tokens] for x in parts)), (0, 0, 0, q.shape[2] - tokens))
        for (_, tokens), *parts in zip(runs, q.split(counts), k.split(counts), v.split(counts), strict=True)
    ]
    return torch.cat(parts)


def _finite(x: Tensor) -> Tensor:
    """Large activations overflow float16; clamp them to its range as the host does (comfy/ldm/lumina/model.py)."""
    if x.dtype == torch.float16:
        return torch.nan_to_num(x, nan=0.0, posinf=65504.0, neginf=-65504.0)
    return x
