"""The node that reads images with more than 8 bits per channel."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .folders import datasets
from .limited import within_limits
from .messages.errors import plain_errors
from .options import DEEP_SUFFIXES


class LoadDeepImage(io.ComfyNode):
    """PNG and TIFF of 16 bits and floats, EXR and DICOM, beside the host's Load Image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PLoadDeepImage",
            display_name="Load Image in Full Depth",
            category="L2P",
            description="Loads a PNG, TIFF, EXR or DICOM file from the input folder with all of its levels, where Load "
            "Image rounds colours.",
            search_aliases=[
                "load image",
                "open tiff",
                "exr",
                "dicom",
                "16 bit",
                "float",
                "bit depth",
                "import",
                "加载图像",
                "16 位",
            ],
            inputs=[
                io.Combo.Input(
                    "image",
                    options=datasets.input_files(DEEP_SUFFIXES),
                    tooltip="A file in the input folder: PNG, TIFF, EXR or DICOM.",
                ),
                io.String.Input(
                    "dicom",
                    default="window",
                    tooltip="How the values of a DICOM file become grey. window: the file's own window; full: from its "
                    "least value to its greatest; 40/400: a centre and a width. Other files do not use it.",
                ),
                io.Int.Input(
                    "frame",
                    default=1,
                    min=1,
                    max=1_000_000,
                    tooltip="Which frame of a DICOM file with several, counted from 1.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The image, float32, black 0 and white 1."),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="White where the image is transparent, as in Load Image; black without transparency.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, image: str | None = None) -> bool | str:
        # Takes the place of the host's comparison with the list, which has no files of subfolders.
        try:
            if image is not None:
                datasets.input_file(image)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, image: str | None = None, **settings: Any) -> Any:
        return datasets.input_fingerprint(image), sorted(settings.items())

    @classmethod
    @plain_errors()
    @within_limits
    def execute(cls, image: str, dicom: str, frame: int) -> io.NodeOutput:
        from .image_loading import load_image
        from .previews import preview_of

        pixels, mask = load_image(image, dicom, frame)
        # Browsers show neither TIFF nor EXR nor DICOM.
        return io.NodeOutput(pixels, mask, ui=preview_of(pixels, cls))
