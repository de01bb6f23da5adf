"""A node that loads a latent source and its pixel model on one set of weights."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .folders import files, kinds
from .folders.kinds import LATENT, first
from .messages.errors import plain_errors
from .messages.progress import tell_at
from .options import WEIGHT_DTYPES

TINY_DELTA = "tiny delta (comes with L2P)"
"""The name of the bundled pixel model's delta, for the tiny source."""


class DualLoader(io.ComfyNode):
    """Two MODELs in little more memory than one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PDualLoader",
            display_name="L2P Dual Loader",
            category="L2P",
            description="Loads a latent model and the L2P model made from it as two MODELs that share the frozen "
            "blocks and take little more memory than one: for Hybrid Sampler and other graphs in both spaces.",
            search_aliases=["load diffusion model", "unet loader", "two models", "hybrid", "l2p", "加载模型", "双模型"],
            inputs=[
                io.Combo.Input(
                    "source",
                    options=kinds.models(*files.WHOLE_MODELS),
                    default=first(LATENT, folders=files.WHOLE_MODELS) or files.TINY,
                    tooltip="The latent model that the L2P model was made from.",
                ),
                io.Combo.Input(
                    "trained",
                    options=[*kinds.deltas(), TINY_DELTA, *kinds.models(*files.WHOLE_MODELS)],
                    tooltip="A delta trained on it, or a whole L2P file whose blocks are the latent model's.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="How weights are stored in memory. fp8 halves the backbone and does not change the head.",
                ),
                io.Combo.Input(
                    "head_tile",
                    options=["auto", "whole", "256", "512", "1024", "2048", "4096"],
                    default="auto",
                    tooltip="As in L2P Loader.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Model.Output(display_name="latent_model", tooltip="Samples latents, with the source's VAE."),
                io.Model.Output(display_name="pixel_model", tooltip="Samples pixels."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, source: str | None = None, trained: str | None = None, **settings: Any) -> Any:
        return files.fingerprint(source, trained), sorted(settings.items())

    @classmethod
    @plain_errors()
    def execute(cls, source: str, trained: str, weight_dtype: str, head_tile: str) -> io.NodeOutput:
        from ..l2p_core.tiny import DELTA_PATH
        from .model.dual_loading import load_dual

        path = str(DELTA_PATH) if trained == TINY_DELTA else files.existing(trained, *files.WHOLE_MODELS)
        latent, pixels = load_dual(files.existing(source, *files.WHOLE_MODELS), path, weight_dtype, head_tile)
        tell_at(cls.hidden.unique_id)(f"{pixels.model.share:.0%} of the latent model's weights are shared.")
        return io.NodeOutput(latent, pixels)
