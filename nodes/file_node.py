"""The common part of nodes that read model files and write one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from comfy_api.latest import io, ui

from .folders import files, results

CATEGORY = "L2P/files"


def unchecked_base_input() -> io.Boolean.Input:
    """The input for bases that cannot be checked; optional, because workflows of earlier versions do not have it."""
    return io.Boolean.Input(
        "unchecked_base",
        default=False,
        optional=True,
        tooltip="Accepts a quantised base of another program, which does not state what it was made from. Switch it on "
        "only if you know that it is the base of the delta.",
    )


def about_inputs() -> list[io.Input]:
    """Metadata of the new file in addition to that of its sources."""
    return [
        io.String.Input("license", default="", optional=True, tooltip="The licence that the new file states."),
        io.String.Input(
            "trigger_words",
            default="",
            optional=True,
            tooltip="Words that prompts should contain; ComfyUI's model library shows them.",
        ),
    ]


class FileNode(io.ComfyNode):
    """The common part of nodes that read model files and write one.

    Attributes:
        reads: its inputs that are files.
    """

    reads: ClassVar[tuple[str, ...]]

    @classmethod
    def schema(
        cls, inputs: Sequence[io.Input], filename: str, more: Sequence[io.Input] = (), **about: Any
    ) -> io.Schema:
        return io.Schema(
            category=CATEGORY,
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                *inputs,
                io.String.Input(
                    "filename",
                    default=filename,
                    tooltip="The new file's name in models/diffusion_models; folders are allowed.",
                ),
                io.Boolean.Input(
                    "overwrite", default=False, tooltip="Whether a file of that name may be replaced; off refuses."
                ),
                *more,
            ],
            outputs=[
                io.Combo.Output(
                    display_name="file", options=files.choices(), tooltip="The new file's name, for L2P Loader."
                ),
                io.String.Output(display_name="report", tooltip="What happened to every tensor."),
            ],
            **about,
        )

    @classmethod
    def validate_inputs(cls, filename: str | None = None) -> bool | str:
        """What is wrong with the new file's name, before anything runs; True if nothing is.

        An existing file is checked only when the node runs: a result cached by the host is not an error.
        """
        try:
            if filename is not None:
                files.target(filename)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, filename: str | None = None, **inputs: Any) -> Any:
        read = [inputs.pop(name, None) for name in cls.reads]
        return files.fingerprint(*read), results.fingerprint(cls, filename), sorted(inputs.items())

    @classmethod
    def done(cls, filename: str, target: Path, report: str) -> io.NodeOutput:
        results.remember(cls, filename, target)
        return io.NodeOutput(files.name_of(target), report, ui=ui.PreviewText(report))
