"""Nodes that load a MODEL: from a file, or the bundled tiny one."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .file_node import unchecked_base_input
from .folders import files, kinds
from .folders.kinds import INITIAL, LATENT, PIXEL, first
from .messages.errors import plain_errors
from .messages.progress import tell_at
from .options import WEIGHT_DTYPES


class L2PLoader(io.ComfyNode):
    """An L2P file, or a delta on its base, as a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PLoader",
            display_name="L2P Loader",
            category="L2P",
            description="Loads an L2P pixel-space model of any variant (1k, 4k, 8k, 10k; detected from the file) as a "
            "MODEL for Pixel Sampler, KSampler and everything else that takes one. Load Diffusion Model and Load "
            "Checkpoint load a whole model too; deltas and the size of the head's tiles are available only here.",
            search_aliases=[
                "load diffusion model",
                "unet loader",
                "l2p",
                "z-image pixel",
                "pixel space model",
                "加载模型",
                "像素空间模型",
            ],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=kinds.models(*files.WHOLE_MODELS),
                    default=first(PIXEL, LATENT, INITIAL, folders=files.WHOLE_MODELS) or files.TINY,
                    tooltip="From models/diffusion_models or models/checkpoints: an L2P model, or the base that the "
                    "delta was made for.",
                ),
                io.Combo.Input(
                    "delta",
                    options=[files.NO_FILE, *kinds.deltas()],
                    default=files.NO_FILE,
                    tooltip="A file of trained weights to merge into the base while loading; none for a whole model.",
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
                    tooltip="The Detailer Head works tile by tile with the same result: smaller tiles take less "
                    "memory, auto chooses by free memory.",
                ),
                unchecked_base_input(),
            ],
            outputs=[io.Model.Output(tooltip="For L2P Pixel Sampler, KSampler or any other sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        try:
            if file is not None:
                files.existing(file, *files.WHOLE_MODELS)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, delta: str | None = None, **settings: Any) -> Any:
        return files.fingerprint(file, delta), sorted(settings.items())

    @classmethod
    @plain_errors()
    def execute(
        cls, file: str, delta: str, weight_dtype: str, head_tile: str, unchecked_base: bool = False
    ) -> io.NodeOutput:
        from .model.loading import load_model

        delta_path = None if delta == files.NO_FILE else files.existing(delta)
        path = files.existing(file, *files.WHOLE_MODELS)
        model = load_model(path, delta_path, weight_dtype, head_tile, unchecked_base)
        _say_what_was_loaded(cls, model)
        return io.NodeOutput(model)


def _say_what_was_loaded(node: type[io.ComfyNode], model: Any) -> None:
    from .options import UNTRAINED
    from .sizes import settings_of

    untrained = f" {UNTRAINED}" if model.model.untrained else ""
    tell_at(node.hidden.unique_id)(settings_of(model.model.l2p) + untrained)


class Demo(io.ComfyNode):
    """The bundled tiny model as MODEL and CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PDemo",
            display_name="L2P Demo",
            category="L2P",
            description="A tiny L2P model that comes with this pack: coloured shapes of 64 pixels, in seconds on "
            "any machine, with nothing to download. For trying out workflows.",
            search_aliases=["l2p example", "tiny model", "test model", "l2p", "示例", "微型模型"],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Model.Output(tooltip="For KSampler: 30 steps, cfg 2, euler, simple. cfg 8 distorts the shapes."),
                io.Clip.Output(tooltip="Knows the words of its own captions only."),
            ],
        )

    @classmethod
    @plain_errors()
    def execute(cls) -> io.NodeOutput:
        from .model.demo import load_demo

        model, clip = load_demo()
        _say_what_was_loaded(cls, model)
        return io.NodeOutput(model, clip)


class DemoSource(io.ComfyNode):
    """The bundled tiny latent model as MODEL, CLIP and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PDemoSource",
            display_name="L2P Demo Source",
            category="L2P/train",
            description="The tiny latent model that L2P Demo's model was converted from, with its VAE: it generates "
            "training images of coloured shapes, 64 pixels wide, with nothing to download. For trying out training.",
            search_aliases=["l2p example", "tiny model", "latent source", "test model", "示例", "潜空间来源"],
            outputs=[
                io.Model.Output(tooltip="The tiny latent model."),
                io.Clip.Output(tooltip="Knows the words of its own captions only."),
                io.Vae.Output(tooltip="Its VAE, for VAE Decode and for nodes that make data sets."),
            ],
        )

    @classmethod
    @plain_errors()
    def execute(cls) -> io.NodeOutput:
        from .model.demo_source import load_demo_source

        return io.NodeOutput(*load_demo_source())
