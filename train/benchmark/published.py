"""One forward pass as the published code computes it: the baseline of `l2p benchmark gpu`.

Rotations in complex numbers, norms and gates as separate operations, the Detailer Head whole at full resolution in
torch's default memory order. It uses the weights of an `L2PModel` and nothing else of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ...l2p_core.config import NORM_EPS, PixelConfig
from ...l2p_core.model import L2PModel
from ...l2p_core.patch import padded_size, patchify
from ...l2p_core.sources.next_dit import Attention, Block
from ...l2p_core.sources.z_image import TRAITS
from .head import contiguous_forward


@torch.no_grad()
def published_velocity(model: L2PModel, pixels: Tensor, sigma: Tensor, caption: Tensor) -> Tensor:
    """The velocity of one image.

    Args:
        model: provides the weights; plain linear layers, on the device of the inputs.
        pixels: (1, 3, H, W), sides multiples of the model's `size_multiple`.
        sigma: (1,) noise level in [0, 1].
        caption: (L, caption_dim).

    Returns:
        (1, 3, H, W) in the dtype of `pixels`.
    """
    config, dtype = model.config, model.x_embedder.weight.dtype
    rows, columns = (side // config.patch_size for side in pixels.shape[-2:])
    x = pixels.to(dtype)
    t = model.t_embedder(sigma)
    image = _padded(model.x_embedder(patchify(x, config.patch_size)), model.x_pad_token)
    norm, linear = model.get_parameter("cap_embedder.0.weight"), model.get_submodule("cap_embedder.1")
    text = _padded(linear(_norm(caption.to(dtype)[None], norm)), model.cap_pad_token)
    image_rope, text_rope = _rotations(config, rows, columns, image.shape[1], text.shape[1], pixels.device)
    for block in model.noise_refiner:
        image = _block(block, image, image_rope, t)
    for block in model.context_refiner:
        text = _block(block, text, text_rope, None)
    joint, rope = torch.cat([image, text], 1), torch.cat([image_rope, text_rope])
    for block in model.layers:
        joint = _block(block, joint, rope, t)
    features = rearrange(joint[:, : rows * columns], "b (h w) d -> b d h w", h=rows).contiguous()
    return -contiguous_forward(model.local_decoder, x, features).to(pixels.dtype)


def _padded(tokens: Tensor, pad: Tensor) -> Tensor:
    missing = padded_size(tokens.shape[1], TRAITS.token_multiple) - tokens.shape[1]
    return torch.cat([tokens, repeat(pad, "one d -> b (one n) d", b=len(tokens), n=missing)], 1) if missing else tokens


def _rotations(
    config: PixelConfig, rows: int, columns: int, image: int, text: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Complex rotations (tokens, head_dim / 2) of `image` and of `text` tokens."""
    at = torch.zeros(image + text, 3, dtype=torch.float64)
    at[: rows * columns, 0] = text + 1
    at[: rows * columns, 1] = torch.arange(rows).repeat_interleave(columns)
    at[: rows * columns, 2] = torch.arange(columns).repeat(rows)
    at[image:, 0] = torch.arange(1, text + 1)
    angles = torch.cat(
        [
            at[:, axis, None] * TRAITS.theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            for axis, dim in enumerate(config.rope_dims)
        ],
        dim=1,
    )
    turned = torch.polar(torch.ones_like(angles), angles).to(torch.complex64).to(device)
    return turned[:image], turned[image:]


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)).to(x.dtype) * weight


def _block(block: nn.Module, x: Tensor, rope: Tensor, t: Tensor | None) -> Tensor:
    assert isinstance(block, Block)
    if block.adaLN_modulation is None or t is None:
        attended = _attention(block.attention, _norm(x, block.attention_norm1.weight), rope)
        x = x + _norm(attended, _of(block, "attention"))
        return x + _norm(_fed(block, _norm(x, block.ffn_norm1.weight)), _of(block, "ffn"))
    scale_msa, gate_msa, scale_mlp, gate_mlp = block.adaLN_modulation(t)[:, None].chunk(4, dim=-1)
    attended = _attention(block.attention, _norm(x, block.attention_norm1.weight) * (1 + scale_msa), rope)
    x = x + gate_msa.tanh() * _norm(attended, _of(block, "attention"))
    fed = _fed(block, _norm(x, block.ffn_norm1.weight) * (1 + scale_mlp))
    return x + gate_mlp.tanh() * _norm(fed, _of(block, "ffn"))


def _of(block: Block, part: str) -> Tensor:
    """The weight of the norm of a part."""
    return block.get_parameter(f"{part}_norm2.weight")


def _attention(layer: Attention, x: Tensor, rope: Tensor) -> Tensor:
    q, k, v = (
        rearrange(F.linear(x, weight), "b n (h d) -> b n h d", d=layer.head_dim) for weight in layer.qkv.weight.chunk(3)
    )
    q, k = _rotated(_norm(q, layer.q_norm.weight), rope), _rotated(_norm(k, layer.k_norm.weight), rope)
    x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return layer.out(rearrange(x, "b h n d -> b n (h d)"))


def _rotated(x: Tensor, rope: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope[:, None]).flatten(-2).to(x.dtype)


def _fed(block: Block, x: Tensor) -> Tensor:
    layer = block.feed_forward
    return layer.w2(F.silu(layer.w1(x)) * layer.w3(x))
