"""Nodes that write files: convert a latent model, save a delta, merge a delta."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .file_node import FileNode, about_inputs, unchecked_base_input
from .folders import datasets, files, kinds
from .folders.kinds import DELTA, INITIAL, LATENT, PIXEL, first
from .limited import within_limits
from .messages.errors import plain_errors
from .options import AS_TRAINED, DELTA_DTYPES, VARIANTS


def _file(id: str, tooltip: str, *suited: str) -> io.Combo.Input:
    """A choice of models; the default is the first file of these kinds, else the bundled source."""
    return io.Combo.Input(id, options=kinds.models(), default=first(*suited) or files.TINY, tooltip=tooltip)


def _own_file(id: str, tooltip: str, kind: str, offered: list[str]) -> io.Combo.Input:
    """A choice of files that do not come with the pack; the default is the first of this kind, else none."""
    options = [files.NO_FILE, *offered]
    return io.Combo.Input(id, options=options, default=first(kind) or files.NO_FILE, tooltip=tooltip)


def _chosen(name: str, what: str, made_by: str) -> str:
    """The full path of a file chosen in an input of `_own_file`.

    Raises:
        ValueError: if none is chosen, or it does not exist.
    """
    if name == files.NO_FILE:
        raise ValueError(f"No {what} is chosen: choose one in the list. If the list has none, {made_by}.")
    return files.existing(name)


class ConvertToL2P(FileNode):
    """Converts a latent source to the pixel initialisation that training starts from."""

    reads = ("source",)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            node_id="L2PConvert",
            display_name="Convert to L2P",
            description="Turns a latent source (or a smaller L2P variant) into an L2P file with a new patch "
            "embedder and Detailer Head. Training starts from the result; before training it generates noise.",
            search_aliases=[
                "convert checkpoint",
                "pixel initialisation",
                "pixel initialization",
                "z-image to l2p",
                "转换模型",
                "像素初始化",
            ],
            inputs=[
                _file("source", "The latent source, such as Z-Image, or an L2P model of a smaller variant.", LATENT),
                io.Combo.Input(
                    "variant",
                    options=list(VARIANTS),
                    default=VARIANTS[0],
                    tooltip="The size of images that the new model is meant for.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    # A new seed would produce a new file, which a second run of the workflow would refuse to write.
                    control_after_generate=False,
                    tooltip="The seed of the new weights; the same seed gives the same file.",
                ),
            ],
            filename="l2p-1k-init",
            more=[
                io.Combo.Input(
                    "dataset",
                    options=[files.NO_FILE, *datasets.choices()],
                    default=files.NO_FILE,
                    optional=True,
                    tooltip="A data set that Synthesize L2P Dataset made with this source: the new patch embedder is "
                    "fitted to the source's own on its images, which leaves less to train. For 1k only.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(
        cls, filename: str | None = None, dataset: str | None = None, **inputs: Any
    ) -> tuple[Any, str]:
        fitted = "" if dataset in (None, files.NO_FILE) else datasets.pairs_fingerprint(dataset)
        return super().fingerprint_inputs(filename=filename, **inputs), fitted

    @classmethod
    @plain_errors()
    @within_limits
    def execute(
        cls, source: str, variant: str, seed: int, filename: str, overwrite: bool, dataset: str = files.NO_FILE
    ) -> io.NodeOutput:
        from .messages.jobs import convert_file

        target = files.new_file(filename, overwrite)
        folder = None if dataset == files.NO_FILE else datasets.existing(dataset)
        report = convert_file(files.existing(source), target, variant, seed, overwrite, folder)
        return cls.done(filename, target, report)


class SaveDelta(FileNode):
    """Saves the weights that training changed as a small file to share."""

    reads = ("trained", "base")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            node_id="L2PSaveDelta",
            display_name="Save L2P Delta",
            description="Saves only what training changed in a trained L2P file, to share and to load onto the base "
            "with L2P Loader: less than half the size, without a second copy of the base.",
            search_aliases=["extract delta", "difference", "l2p delta", "提取增量", "差分"],
            inputs=[
                _own_file("trained", "The trained L2P model.", PIXEL, kinds.whole_files()),
                _own_file("base", "The pixel initialisation that training started from.", INITIAL, kinds.whole_files()),
            ],
            filename="l2p-delta",
            more=[
                io.Combo.Input(
                    "dtype",
                    options=list(DELTA_DTYPES),
                    default=AS_TRAINED,
                    optional=True,
                    tooltip="bf16 halves a delta that was trained in float32.",
                ),
                *about_inputs(),
            ],
        )

    @classmethod
    @plain_errors()
    def execute(
        cls,
        trained: str,
        base: str,
        filename: str,
        overwrite: bool,
        dtype: str = AS_TRAINED,
        license: str = "",
        trigger_words: str = "",
    ) -> io.NodeOutput:
        from .messages.jobs import extract_delta

        new = _chosen(trained, "trained model", "put a trained L2P model into models/diffusion_models")
        old = _chosen(base, "base", "put the model that training started from into models/diffusion_models")
        target = files.new_file(filename, overwrite)
        about = {"license": license, "trigger_words": trigger_words}
        report = extract_delta(new, old, target, overwrite, DELTA_DTYPES.get(dtype), about)
        return cls.done(filename, target, report)


class MergeDelta(FileNode):
    """Merges a delta and its base into one whole L2P file."""

    reads = ("delta", "base")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            node_id="L2PMergeDelta",
            display_name="Merge L2P Delta",
            description="Merges a delta into the base it was made for, the latent source or the pixel initialisation, "
            "and saves a whole L2P model. L2P Loader does the same while loading, without a new file.",
            search_aliases=["merge checkpoint", "apply delta", "l2p delta", "合并模型", "应用增量"],
            inputs=[
                _own_file("delta", "The file of trained weights.", DELTA, kinds.deltas()),
                _file(
                    "base",
                    "The latent source, or the pixel initialisation, that the delta was made for.",
                    LATENT,
                    INITIAL,
                ),
            ],
            filename="l2p-merged",
            more=[unchecked_base_input()],
        )

    @classmethod
    @plain_errors()
    def execute(
        cls, delta: str, base: str, filename: str, overwrite: bool, unchecked_base: bool = False
    ) -> io.NodeOutput:
        from .messages.jobs import merge_delta

        new = _chosen(delta, "delta", "make one with Train L2P, or put one into models/diffusion_models")
        target = files.new_file(filename, overwrite)
        report = merge_delta(new, files.existing(base), target, overwrite, unchecked_base)
        return cls.done(filename, target, report)
