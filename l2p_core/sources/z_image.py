"""The architecture Z-Image (arXiv 2511.22699), the published source of L2P."""

from __future__ import annotations

from ..config import ModelConfig
from .key_layout import KeyLayout, Stacked
from .next_dit import EMBEDDERS, LANDMARKS, MODULATION, STACKS, FinalLayer, NextDiT, Traits, sizes
from .source import PublishedEncoder, Source

TRAITS = Traits(time_scale=1000.0, theta=256.0, token_multiple=32, silu=False)

LAYOUT = KeyLayout(
    pairs=(
        ("x_embedder.{}", "all_x_embedder.{patch}-1.{}"),
        ("final_layer.{}", "all_final_layer.{patch}-1.{}"),
        ("{}.attention.out.{}", "{}.attention.to_out.0.{}"),
        ("{}.attention.q_norm.{}", "{}.attention.norm_q.{}"),
        ("{}.attention.k_norm.{}", "{}.attention.norm_k.{}"),
    ),
    stacked=(
        # Weights alone are stacked: the scales of quantised ones are not rows of one matrix.
        Stacked(
            "{}.attention.qkv.weight",
            ("{}.attention.to_q.weight", "{}.attention.to_k.weight", "{}.attention.to_v.weight"),
        ),
    ),
)


class ZImage(NextDiT):
    """The 6B model's network."""

    traits = TRAITS


Z_IMAGE = Source(
    name="z-image",
    title="Z-Image",
    config=ModelConfig,
    sizes=sizes,
    backbone=ZImage,
    projection=FinalLayer,
    marks=("x_pad_token", "cap_pad_token"),
    landmarks=(*LANDMARKS, "cap_pad_token"),
    layout=LAYOUT,
    embedder="x_embedder",
    output="final_layer",
    stacks=STACKS,
    trained=(*EMBEDDERS, "x_pad_token", "cap_pad_token"),
    encoder=PublishedEncoder(
        "Qwen3-4B",
        family="Qwen3",
        model_type="qwen3",
        max_tokens=512,
        # The chat template for one user turn with the generation prompt, thinking allowed.
        template="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        # https://huggingface.co/Qwen/Qwen3-4B/blob/main/config.json
        unseen=(("rope_theta", 1_000_000.0), ("rms_norm_eps", 1e-6)),
        tokenizer_elsewhere="; ComfyUI has one in comfy/text_encoders/qwen25_tokenizer",
    ),
    pads=("x_pad_token", "cap_pad_token"),
    never_8_bit=(MODULATION,),
    token_multiple=TRAITS.token_multiple,
    relatives=(
        ("siglip_", "a Z-Image Omni or Edit model, which reads images beside the text"),
        ("dec_net.", "another kind of pixel-space Z-Image (with a 'dec_net' in place of a Detailer Head)"),
        ("control_layers.", "a ControlNet for Z-Image"),
        ("control_noise_refiner.", "a ControlNet for Z-Image"),
    ),
    unused=("norm_final.weight",),
    recipe="z-image",
)
