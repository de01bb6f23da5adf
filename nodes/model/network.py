"""L2P's network on the host's own backbone of Z-Image and its family.

Subclassing the host's NextDiT, rather than running `l2p_core`'s backbone inside it, is what makes LoRA, model
patches, offloading, quantised linears, attention backends and torch.compile work as for every other model there.
Parameter names are those of `l2p_core`, and a test holds the two networks to each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.diffusionmodules.mmdit import TimestepEmbedder
from einops import rearrange
from torch import Tensor

from ...l2p_core.config import NORM_EPS, ModelConfig, PixelConfig
from ...l2p_core.detailer import DetailerHead, velocity_of
from ...l2p_core.patch import pad_to_multiple
from ...l2p_core.sources import source_of
from ...l2p_core.sources.next_dit import NextDiT as OwnNextDiT

LATENT_CHANNELS = 16
"""Latent channels that patches made for Z-Image expect."""

TILE_OPTION = "l2p_head_tile"
"""Key of `transformer_options` that carries the automatic tile of a step to the network; None for whole."""

Patch = Callable[[dict[str, Any]], dict[str, Any]]


class SizedNextDiT(NextDiT):
    """The host's backbone with the sizes of a checkpoint and the traits of its source.

    Raises:
        ValueError: for a timestep embedding of another width than the host's blocks of these sizes take.
    """

    def __init__(self, sizes: ModelConfig, device: Any = None, dtype: Any = None, operations: Any = None):
        backbone = source_of(sizes).backbone
        assert issubclass(backbone, OwnNextDiT), f"the host's NextDiT does not run {sizes.source}"
        traits = backbone.traits
        super().__init__(
            patch_size=sizes.patch_size,
            in_channels=sizes.in_channels,
            dim=sizes.dim,
            n_layers=sizes.n_layers,
            n_refiner_layers=sizes.n_refiner_layers,
            n_heads=sizes.n_heads,
            n_kv_heads=sizes.n_kv_heads,
            # The host rounds int(multiplier * dim) up to multiple_of; the half keeps int() from landing one short.
            multiple_of=1,
            ffn_dim_multiplier=(sizes.ffn_dim + 0.5) / sizes.dim,
            norm_eps=NORM_EPS,
            qk_norm=True,
            cap_feat_dim=sizes.caption_dim,
            axes_dims=list(sizes.rope_dims),
            rope_theta=traits.theta,
            z_image_modulation=not traits.silu,
            time_scale=traits.time_scale,
            pad_tokens_multiple=traits.token_multiple if traits.token_multiple > 1 else None,
            device=device,
            dtype=dtype,
            operations=operations,
        )
        taken = self.layers[0].adaLN_modulation[-1].in_features
        if sizes.t_dim != taken:
            raise ValueError(
                f"This model's timestep embedding has {sizes.t_dim} values, but in ComfyUI, blocks of {sizes.dim} take "
                f"{taken}: use a model of the published sizes, or sample this one with `l2p sample`."
            )
        # The host sizes the timestep embedder for the 6B model; smaller ones have their own.
        self.t_embedder = TimestepEmbedder(
            sizes.t_hidden_dim,
            frequency_embedding_size=sizes.t_freq_dim,
            output_size=sizes.t_dim,
            device=device,
            dtype=dtype,
            operations=operations,
        )


class L2PNextDiT(SizedNextDiT):
    """The host's NextDiT with a Detailer Head (`local_decoder`) in place of its final layer.

    Args:
        l2p: the sizes, read off the checkpoint.
        head_tile: side in pixels of the head's tiles, 0 for the whole image at once, None for what `TILE_OPTION` says.
    """

    def __init__(
        self,
        l2p: PixelConfig,
        head_tile: int | None = None,
        device: Any = None,
        dtype: Any = None,
        operations: Any = None,
        **_: Any,
    ):
        super().__init__(l2p, device, dtype, operations)
        del self.final_layer
        self.local_decoder = DetailerHead(l2p.head, l2p.dim, operations, device=device, dtype=dtype)
        self.l2p = l2p
        self.head_tile = head_tile

    def _forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        num_tokens: int,
        attention_mask: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **_: Any,
    ) -> Tensor:
        """Noisy pixels (B, 3, H, W), sigmas (B,) and captions (B, L, C) to the velocity (B, 3, H, W).

        Follows NextDiT._forward of comfy/ldm/lumina/model.py up to the final layer.
        """
        height, width = x.shape[-2:]
        pixels = pad_to_multiple(x, self.l2p.size_multiple)
        rows, columns = pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size
        options = _with_latent_view({} if transformer_options is None else transformer_options, rows, columns)

        t = self.t_embedder((1.0 - timesteps) * self.time_scale, dtype=x.dtype)
        tokens, mask, _, caption_lengths, rope, _ = self.patchify_and_embed(
            pixels, context, attention_mask, t, num_tokens, transformer_options=options
        )
        caption = caption_lengths[0]
        tokens = self._joint_blocks(tokens, mask, rope.to(tokens.device), t, caption, pixels, options)
        features = rearrange(tokens[:, caption : caption + rows * columns], "b (h w) d -> b d h w", h=rows, w=columns)
        # Free memory is queried outside, where a compiler does not trace.
        tile = self.head_tile if self.head_tile is not None else options.get(TILE_OPTION)
        # The head returns x0 - noise (arXiv 2605.12013 section 3.2), the sampler wants noise - x0.
        return velocity_of(self.local_decoder(pixels, features, tile or None))[..., :height, :width]

    def _joint_blocks(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        rope: Tensor,
        t: Tensor,
        caption: int,
        pixels: Tensor,
        options: dict[str, Any],
    ) -> Tensor:
        """The blocks on [caption, image] tokens, with the host's `double_block` patches after each."""
        patches: list[Patch] = options.get("patches", {}).get("double_block", [])
        options["total_blocks"] = len(self.layers)
        options["block_type"] = "double"
        first = tokens
        for i, layer in enumerate(self.layers):
            options["block_index"] = i
            tokens = layer(tokens, mask, rope, t, transformer_options=options)
            for patch in patches:
                out = patch(
                    {
                        "img": tokens[:, caption:],
                        "img_input": first[:, caption:],
                        "txt": tokens[:, :caption],
                        "pe": rope[:, caption:],
                        "vec": t,
                        "x": pixels,
                        "block_index": i,
                        "transformer_options": options,
                    }
                )
                if "img" in out:
                    tokens[:, caption:] = out["img"]
                if "txt" in out:
                    tokens[:, :caption] = out["txt"]
        return tokens


def _with_latent_view(options: dict[str, Any], rows: int, columns: int) -> dict[str, Any]:
    """Let model patches see an `x` of the size that a latent with the same tokens would have.

    ControlNet-style patches (comfy_extras/nodes_model_patch.py) multiply the size of `x` by the VAE's compression
    to find the image they re-encode; given pixels, they would encode eight times the image's size.
    """
    patches = options.get("patches", {})
    wrapped = {
        name: [_sees_latent(patch, rows, columns) for patch in patches[name]]
        for name in ("noise_refiner", "double_block")
        if name in patches
    }
    return {**options, "patches": {**patches, **wrapped}}


def _sees_latent(patch: Patch, rows: int, columns: int) -> Patch:
    def call(args: dict[str, Any]) -> dict[str, Any]:
        pixels: Tensor = args["x"]
        # Patches read the size, dtype and device; an expanded view of one element takes no memory.
        view = torch.zeros(1, dtype=pixels.dtype, device=pixels.device)
        latent = view.expand(pixels.shape[0], LATENT_CHANNELS, 2 * rows, 2 * columns)
        return patch({**args, "x": latent})

    return call
