"""Nodes between IMAGE and the LATENT of a pixel model, for the host's own samplers."""

from __future__ import annotations

from comfy_api.latest import io

from .limited import within_limits
from .messages.errors import plain_errors
from .messages.progress import tell_at
from .options import AS_TYPED, ASPECTS, MAX_SIDE, OF_MODEL

CATEGORY = "L2P/pixels"


def width_and_height(more: str) -> list[io.Input]:
    """The two inputs of a size; any number is allowed, 0 is the model's own."""
    return [
        io.Int.Input(
            name,
            default=OF_MODEL,
            min=OF_MODEL,
            max=MAX_SIDE,
            tooltip=f"{name.capitalize()} in pixels, any number; {more}",
        )
        for name in ("width", "height")
    ]


def aspect_input() -> io.Combo.Input:
    """A choice of aspect ratios; the last input, for workflows that were saved without it."""
    return io.Combo.Input(
        "aspect",
        options=[AS_TYPED, *ASPECTS],
        default=AS_TYPED,
        optional=True,
        tooltip="An aspect ratio, at the area that the model was trained at; width and height are then not used.",
    )


class EmptyPixels(io.ComfyNode):
    """A blank LATENT for text to image with KSampler and similar samplers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PEmptyPixels",
            display_name="Empty Pixels",
            category=CATEGORY,
            description="A blank canvas of pixels for KSampler and other samplers with an L2P model: "
            "the counterpart of Empty Latent Image, without a VAE.",
            search_aliases=["empty latent", "blank pixels", "pixel latent", "l2p latent", "空 latent", "空白画布"],
            inputs=[
                *width_and_height("0 is the size of the connected model, or 1024 without one."),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="How many images to generate at once."),
                io.Model.Input("model", optional=True, tooltip="An L2P model; a width and height of 0 take its size."),
                aspect_input(),
            ],
            outputs=[io.Latent.Output(display_name="pixels", tooltip="Pixels as a LATENT, for any sampler.")],
        )

    @classmethod
    @plain_errors()
    @within_limits
    def execute(
        cls,
        width: int,
        height: int,
        batch_size: int,
        model: io.Model.Type | None = None,
        aspect: str = AS_TYPED,
    ) -> io.NodeOutput:
        from .pixels import empty_pixels
        from .sizes import chosen_size, l2p_config

        size = chosen_size(l2p_config(model), width, height, aspect)
        return io.NodeOutput(empty_pixels(*size, batch_size))


class ImageToPixels(io.ComfyNode):
    """The pixel model's counterpart of VAE Encode."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PImageToPixels",
            display_name="Image to Pixels",
            category=CATEGORY,
            description="An image as the LATENT of an L2P model: the counterpart of VAE Encode, exact and instant. "
            "With a mask, samplers paint only where it is white.",
            search_aliases=[
                "vae encode",
                "image to latent",
                "encode pixels",
                "inpaint",
                "noise mask",
                "vae 编码",
                "局部重绘",
            ],
            inputs=[
                io.Image.Input("image", tooltip="The image to start from; its alpha channel is dropped."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White is repainted, black is kept. Any shape, as large as the image.",
                ),
                *(
                    io.Int.Input(
                        name,
                        default=0,
                        min=0,
                        max=MAX_SIDE,
                        optional=True,
                        tooltip=f"{name.capitalize()} to resize to, in pixels; 0 is the image's own.",
                    )
                    for name in ("width", "height")
                ),
            ],
            outputs=[io.Latent.Output(display_name="pixels", tooltip="Pixels as a LATENT, for any sampler.")],
        )

    @classmethod
    @plain_errors()
    @within_limits
    def execute(
        cls, image: io.Image.Type, mask: io.Mask.Type | None = None, width: int = 0, height: int = 0
    ) -> io.NodeOutput:
        from .pixels import image_to_pixels

        return io.NodeOutput(image_to_pixels(image, mask, width, height))


class PixelsToImage(io.ComfyNode):
    """The pixel model's counterpart of VAE Decode."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PPixelsToImage",
            display_name="Pixels to Image",
            category=CATEGORY,
            description="Converts a sampler's result with an L2P model to an image: the counterpart of VAE Decode, "
            "exact and instant, with no tiles at any size.",
            search_aliases=["vae decode", "latent to image", "decode pixels", "vae 解码"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Latent.Input("pixels", tooltip="The LATENT from a sampler with an L2P model."),
                io.Boolean.Input(
                    "clamp",
                    default=True,
                    optional=True,
                    tooltip="Whether values beyond black and white are clamped to them. Off keeps them, for float "
                    "files, and shows the range.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image", tooltip="The images, for Save Image and all nodes that take an IMAGE."
                )
            ],
        )

    @classmethod
    @plain_errors()
    def execute(cls, pixels: io.Latent.Type, clamp: bool = True) -> io.NodeOutput:
        from .pixels import pixels_to_image, range_of

        image = pixels_to_image(pixels, clamp)
        tell_at(cls.hidden.unique_id)("" if clamp else range_of(image))
        return io.NodeOutput(image)
