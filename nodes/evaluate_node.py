"""Evaluate L2P: what transfer keeps, between two folders of images or two batches."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .folders import evaluations, image_folders, results
from .limited import within_limits
from .messages.errors import plain_errors


class EvaluateL2P(io.ComfyNode):
    """Statistics of a source's images beside those of the pixel model, as a report."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def folder(id: str, whose: str) -> io.Combo.Input:
            return io.Combo.Input(
                id,
                options=image_folders.choices(),
                default=image_folders.NO_FOLDER,
                tooltip=f"A folder of {whose} images under output, input or datasets; not used when images are "
                "connected.",
            )

        return io.Schema(
            node_id="L2PEvaluate",
            display_name="Evaluate L2P",
            category="L2P",
            description="Compares the images of a latent model with those of its pixel model, of the same prompts and "
            "seeds: patch grid, spectrum, colour, contrast, sharpness, values at black and white, near-duplicates. The "
            "report, one page with pictures, is written to output/l2p_evaluations. Nothing is downloaded.",
            search_aliases=[
                "statistics",
                "quality",
                "image metrics",
                "spectrum",
                "patch grid",
                "report",
                "评估",
                "评测",
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("source_images", optional=True, tooltip="The source's images, in place of a folder."),
                io.Image.Input(
                    "pixel_images",
                    optional=True,
                    tooltip="The pixel model's images, in the same order as the source's.",
                ),
                folder("source_folder", "the source's"),
                folder("pixel_folder", "the pixel model's"),
                io.String.Input(
                    "name",
                    default="evaluation",
                    tooltip="The report's name in output/l2p_evaluations; a report of that name is replaced.",
                ),
                io.Int.Input(
                    "patch",
                    default=16,
                    min=2,
                    max=1024,
                    tooltip="Side in pixels of the pixel model's patches, whose borders are measured: 16 for 1k.",
                ),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="The table of the report as text.")],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        try:
            if name is not None:
                evaluations.page(name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(
        cls, source_folder: str | None = None, pixel_folder: str | None = None, name: str | None = None, **settings: Any
    ) -> Any:
        folders = [image_folders.fingerprint(folder) for folder in (source_folder, pixel_folder)]
        return folders, results.fingerprint(cls, name), settings.get("patch")

    @classmethod
    @plain_errors()
    @within_limits
    def execute(
        cls,
        source_folder: str,
        pixel_folder: str,
        name: str,
        patch: int,
        source_images: io.Image.Type | None = None,
        pixel_images: io.Image.Type | None = None,
    ) -> io.NodeOutput:
        from .evaluation import evaluate

        folders = batches = None
        if source_images is not None and pixel_images is not None:
            batches = source_images, pixel_images
        elif source_images is not None or pixel_images is not None:
            missing = "pixel_images" if pixel_images is None else "source_images"
            raise ValueError(f"{missing} is not connected: connect both batches, or neither and choose two folders.")
        elif image_folders.NO_FOLDER in (source_folder, pixel_folder):
            raise ValueError("Nothing to compare: connect two batches of images, or choose two folders.")
        else:
            folders = image_folders.existing(source_folder), image_folders.existing(pixel_folder)
        target = evaluations.page(name)
        text = evaluate(target, patch, folders, batches)
        results.remember(cls, name, target)
        return io.NodeOutput(text, ui={"text": (text,), "l2p_page": [name.strip()]})
