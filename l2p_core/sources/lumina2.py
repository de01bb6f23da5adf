"""The architecture Lumina-Image 2.0 (arXiv 2503.21758)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import VARIANTS, ModelConfig, Sampling
from .key_layout import KeyLayout, Stacked
from .next_dit import EMBEDDERS, LANDMARKS, MODULATION, STACKS, FinalLayer, NextDiT, Traits, sizes
from .shape_reader import ShapeReader
from .source import PublishedEncoder, Source

TRAITS = Traits(time_scale=1.0, theta=10000.0, token_multiple=1, silu=True)

LAYOUT = KeyLayout(
    pairs=(
        ("t_embedder.mlp.0.{}", "time_caption_embed.timestep_embedder.linear_1.{}"),
        ("t_embedder.mlp.2.{}", "time_caption_embed.timestep_embedder.linear_2.{}"),
        ("cap_embedder.{}", "time_caption_embed.caption_embedder.{}"),
        ("final_layer.adaLN_modulation.1.{}", "norm_out.linear_1.{}"),
        ("final_layer.linear.{}", "norm_out.linear_2.{}"),
        ("{}.adaLN_modulation.1.{}", "{}.norm1.linear.{}"),
        ("context_refiner.{}.attention_norm1.{}", "context_refiner.{}.norm1.{}"),
        ("{}.attention_norm1.{}", "{}.norm1.norm.{}"),
        ("{}.attention_norm2.{}", "{}.norm2.{}"),
        ("{}.attention.out.{}", "{}.attn.to_out.0.{}"),
        ("{}.attention.q_norm.{}", "{}.attn.norm_q.{}"),
        ("{}.attention.k_norm.{}", "{}.attn.norm_k.{}"),
        ("{}.feed_forward.w1.{}", "{}.feed_forward.linear_1.{}"),
        ("{}.feed_forward.w2.{}", "{}.feed_forward.linear_2.{}"),
        ("{}.feed_forward.w3.{}", "{}.feed_forward.linear_3.{}"),
    ),
    stacked=(
        Stacked(
            "{}.attention.qkv.weight",
            ("{}.attn.to_q.weight", "{}.attn.to_k.weight", "{}.attn.to_v.weight"),
        ),
    ),
)


@dataclass(frozen=True)
class Lumina2Config(ModelConfig):
    """Its sizes; the defaults are those of the published 2.6B model."""

    dim: int = 2304
    head_dim: int = 96
    n_layers: int = 26
    caption_dim: int = 2304
    ffn_dim: int = 9216
    t_hidden_dim: int = 1024
    t_dim: int = 1024
    source: str = "lumina2"
    n_kv_heads: int = 8

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Channels of a head given to the three RoPE axes, a third each."""
        return self.head_dim // 3, self.head_dim // 3, self.head_dim // 3


class Lumina2(NextDiT):
    """Its network: groups of heads share keys and values, and nothing is padded."""

    traits = TRAITS


def _sizes(read: ShapeReader) -> dict[str, Any]:
    found = sizes(read)
    rows, columns = read.matrix("layers.0.attention.qkv.weight")
    return found | {"n_kv_heads": (rows - columns) // 2 // max(1, found["head_dim"])}


LUMINA2 = Source(
    name="lumina2",
    title="Lumina-2",
    config=Lumina2Config,
    sizes=_sizes,
    backbone=Lumina2,
    projection=FinalLayer,
    marks=("layers.0.adaLN_modulation.1.weight", "noise_refiner.0.adaLN_modulation.1.weight"),
    landmarks=LANDMARKS,
    layout=LAYOUT,
    embedder="x_embedder",
    output="final_layer",
    stacks=STACKS,
    trained=EMBEDDERS,
    # As in diffusers' pipeline and the host's CLIP Text Encode (Lumina 2), "superior".
    encoder=PublishedEncoder(
        "Gemma-2-2B",
        family="Gemma-2",
        model_type="gemma2",
        max_tokens=256,
        template=(
            "You are an assistant designed to generate superior images with the superior degree of image-text "
            "alignment based on textual prompts or user prompts. <Prompt Start> {}"
        ),
        plain_negative=True,
        unseen=(("head_dim", 256), ("query_pre_attn_scalar", 256)),
        # The host's network has no cap on attention scores, and some versions of transformers do not apply it.
        settings=(("attn_logit_softcapping", None),),
    ),
    # Those of the latent model: nothing is published of its pixel models.
    sampling=dict.fromkeys(VARIANTS, Sampling(steps=30, cfg=4.0, shift=6.0)),
    never_8_bit=(MODULATION,),
    token_multiple=TRAITS.token_multiple,
    unused=("norm_final.weight",),
    recipe="lumina2",
)
