"""The node that saves images with more than 8 bits per channel."""

from __future__ import annotations

import importlib.util
from typing import Any

from comfy_api.latest import io

from .folders import results
from .messages.errors import plain_errors
from .options import TIFF_DEPTHS


class SaveTIFF(io.ComfyNode):
    """16-bit and float TIFF, beside the host's PNG and EXR."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PSaveTIFF",
            display_name="Save TIFF",
            category="L2P",
            description="Saves images as TIFF with 16 bits per channel, rounded to the nearest, or as floats, "
            "unchanged, in the output folder.",
            search_aliases=[
                "save image",
                "tif",
                "16 bit",
                "float",
                "bit depth",
                "export",
                "保存图像",
                "16 位",
            ],
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            inputs=[
                io.Image.Input("images", tooltip="The images to save; an alpha channel is dropped."),
                io.String.Input(
                    "filename_prefix",
                    default="ComfyUI",
                    tooltip="The beginning of the files' names, with folders and %date:yyyy-MM-dd% as in Save Image.",
                ),
                io.Combo.Input(
                    "depth",
                    options=list(TIFF_DEPTHS),
                    default=TIFF_DEPTHS[0],
                    tooltip="16-bit: whole numbers, black 0 and white 65535. 32-bit float: black 0, white 1, and "
                    "values beyond them are kept.",
                ),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The images, unchanged.")],
        )

    @classmethod
    def validate_inputs(cls, depth: str | None = None) -> bool | str:
        # Said before anything is sampled that could not be saved.
        if importlib.util.find_spec("tifffile") is None:
            return "TIFF files need the package tifffile: install it into ComfyUI's Python and restart ComfyUI."
        return True

    @classmethod
    def fingerprint_inputs(cls, filename_prefix: str | None = None, **settings: Any) -> Any:
        return results.fingerprint(cls, filename_prefix)

    @classmethod
    @plain_errors()
    def execute(cls, images: io.Image.Type, filename_prefix: str, depth: str) -> io.NodeOutput:
        from .previews import preview_of
        from .saving import save_tiff, saved_paths

        saved = save_tiff(images, filename_prefix, depth, cls.hidden.prompt, cls.hidden.extra_pnginfo)
        results.remember(cls, filename_prefix, *saved_paths(saved))
        # Browsers show no TIFF.
        return io.NodeOutput(images, ui={**preview_of(images, cls), "files": saved})
