"""The node that writes a model in fewer bits."""

from __future__ import annotations

from comfy_api.latest import io

from .file_node import FileNode, about_inputs, unchecked_base_input
from .folders import files, kinds
from .folders.kinds import INITIAL, LATENT, PIXEL, first
from .messages.errors import plain_errors
from .options import QUANTISED_FORMATS


class SaveQuantised(FileNode):
    """A model, or a delta on its base, in 8 bits or in bf16."""

    reads = ("file", "delta")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            node_id="L2PSaveQuantised",
            display_name="Save Quantised L2P",
            description="Saves an L2P model, or a delta on its base, in half the size of bf16: in ComfyUI's own 8-bit "
            "formats, which L2P Loader, Load Diffusion Model and Load Checkpoint read. The Detailer Head stays bf16.",
            search_aliases=["quantize", "quantise", "fp8", "int8", "smaller model", "量化", "压缩模型"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[*kinds.models(*files.WHOLE_MODELS), files.TINY_MODEL],
                    default=first(PIXEL, INITIAL, LATENT, folders=files.WHOLE_MODELS) or files.TINY_MODEL,
                    tooltip="The model to make smaller, in bf16, fp16 or fp32; or the base of the delta.",
                ),
                io.Combo.Input(
                    "delta",
                    options=[files.NO_FILE, *kinds.deltas()],
                    default=files.NO_FILE,
                    tooltip="A file of trained weights to merge into the base; none for a whole model.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(QUANTISED_FORMATS),
                    default=QUANTISED_FORMATS[0],
                    tooltip="float8_e4m3fn and int8_tensorwise halve the size; int8 is closer to the original, but "
                    "older ComfyUIs do not read it. bf16 only changes the type of the weights.",
                ),
            ],
            filename="l2p-quantised",
            more=[unchecked_base_input(), *about_inputs()],
        )

    @classmethod
    @plain_errors()
    def execute(
        cls,
        file: str,
        delta: str,
        format: str,
        filename: str,
        overwrite: bool,
        unchecked_base: bool = False,
        license: str = "",
        trigger_words: str = "",
    ) -> io.NodeOutput:
        from .messages.jobs import quantise_file

        path, own = files.with_own_delta(file)
        delta_path = own if delta == files.NO_FILE else files.existing(delta)
        target = files.new_file(filename, overwrite)
        about = {"license": license, "trigger_words": trigger_words}
        report = quantise_file(path, delta_path, target, format, overwrite, unchecked_base, about)
        return cls.done(filename, target, report)
