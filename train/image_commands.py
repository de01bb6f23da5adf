"""The commands that generate images: synth and sample."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..l2p_core import ranges
from ..l2p_core.files.paths import typed
from .arguments import Commands, Number, add_unchecked_base, command


def add_synth(commands: Commands) -> None:
    """`l2p synth`."""
    parser = command(commands, "synth", "make training images in running ComfyUI hosts, or with the bundled source")
    parser.add_argument(
        "source", type=typed, metavar="SOURCE", help="ComfyUI workflow in API format with {prompt} in a text, or 'tiny'"
    )
    parser.add_argument("output", type=typed, metavar="FOLDER", help="folder for the images and metadata.csv")
    parser.add_argument(
        "--prompts", type=typed, default=None, metavar="FILE", help="text file with one per line, or a table"
    )
    parser.add_argument("--seeds", type=Number(ranges.COUNT), default=1, metavar="N", help="images per prompt")
    parser.add_argument(
        "--first", type=Number(ranges.FIRST), default=0, metavar="N", help="number of each prompt's first image"
    )
    parser.add_argument(
        "--host", action="append", default=[], metavar="ADDRESS", help="running ComfyUI; several share the work"
    )
    parser.add_argument(
        "--patience", type=Number(ranges.SECONDS), default=60, metavar="SECONDS",
        help="how long to wait for a host that does not answer",
    )  # fmt: skip
    parser.add_argument("--steps", type=Number(ranges.SAMPLING_STEPS), default=None, help="with 'tiny': Euler steps")
    parser.add_argument("--cfg", type=Number(ranges.CFG), default=None, help="with 'tiny': guidance")

    def run(args: argparse.Namespace) -> None:
        from .synth import synth_command

        synth_command(args)

    parser.set_defaults(command=run)


def add_sample(commands: Commands) -> None:
    """`l2p sample`."""
    parser = command(commands, "sample", "generate images with an L2P model")
    parser.add_argument(
        "model",
        type=typed,
        nargs="?",
        default=Path("tiny"),
        metavar="MODEL",
        help="safetensors file or folder of shards; 'tiny' is the bundled source with its delta",
    )
    parser.add_argument("--delta", type=typed, default=None, help="delta to merge into MODEL, its base")
    add_unchecked_base(parser)
    _add_captions(parser)
    _add_images(parser)
    add_sampling(parser).add_argument(
        "--denoise",
        type=Number(ranges.DENOISE),
        default=1.0,
        help="with --init: share of the schedule that is sampled, above 0 to 1",
    )

    def run(args: argparse.Namespace) -> None:
        from .sample import sample_command

        sample_command(args)

    parser.set_defaults(command=run)


def _add_captions(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("caption")
    group.add_argument("--prompt", default=None, help="caption as text; a large model also needs --encoder")
    group.add_argument("--negative", default=None, help="caption to guide away from (default: the empty one)")
    add_encoder(group)
    group.add_argument(
        "--caption-features", type=typed, default=None, metavar="FILE",
        help="in place of --prompt: safetensors file with text encoder states 'positive' and, for guidance, "
        "'negative', each (L, width)",
    )  # fmt: skip


def add_encoder(group: argparse._ActionsContainer) -> None:
    """The options that name a large model's text encoder."""
    group.add_argument(
        "--encoder", type=typed, default=None, metavar="PATH",
        help="text encoder that a large model was published with: folder or safetensors file "
        "(default: the one beside MODEL, as published)",
    )  # fmt: skip
    group.add_argument(
        "--tokenizer", type=typed, default=None, metavar="FOLDER", help="its tokenizer, if it is elsewhere"
    )


def _add_images(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("images")
    side = "in pixels, any number (default: the variant's, or in the shape of --init)"
    group.add_argument(
        "--output",
        type=typed,
        default=Path("l2p.png"),
        help="PNG, TIFF or EXR file; with several seeds, numbered files",
    )
    group.add_argument(
        "--depth", choices=("8", "16", "float"), default=None,
        help="bits of a channel: 8 or 16 in PNG, 16 or float in TIFF, float in EXR (default: the first)",
    )  # fmt: skip
    group.add_argument("--width", type=Number(ranges.SIDE), default=None, help=side)
    group.add_argument("--height", type=Number(ranges.SIDE), default=None, help=side)
    group.add_argument("--seed", type=Number(ranges.IMAGE_SEED), nargs="+", default=[0], help="one image for each")
    group.add_argument(
        "--init", type=typed, default=None,
        help="image to start from; it is cut to the shape of --width and --height if both are given",
    )  # fmt: skip
    group.add_argument(
        "--mask", type=typed, default=None,
        help="with --init: image of the same size, white where it is repainted; the rest stays exactly as it is",
    )  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace images that exist")


def add_sampling(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The options of sampling; returns their group."""
    group = parser.add_argument_group("sampling")
    of_variant = "(default: the variant's)"
    group.add_argument(
        "--steps", type=Number(ranges.SAMPLING_STEPS), default=None, help=f"number of Euler steps {of_variant}"
    )
    group.add_argument("--cfg", type=Number(ranges.CFG), default=None, help=f"guidance; 1 disables it {of_variant}")
    group.add_argument("--shift", type=Number(ranges.SHIFT), default=None, help=f"shift of the schedule {of_variant}")
    group.add_argument(
        "--tile", type=Number(ranges.TILE), default=None,
        help="side of the Detailer Head's tiles in pixels, from 64 (default: as free memory allows)",
    )  # fmt: skip
    group.add_argument(
        "--weights", choices=("auto", "bf16", "fp8", "streamed"), default="auto",
        help="storage of the weights: all in bf16; blocks in fp8, half the size; or blocks streamed from RAM to a GPU "
        "(default: the first that fits into free memory)",
    )  # fmt: skip
    group.add_argument(
        "--compile", action="store_true", help="compile the model's blocks first: takes minutes, then steps are faster"
    )
    group.add_argument(
        "--device", default=None,
        help="torch device, such as cpu, cuda:1 or mps (default: a GPU if there is one with enough memory)",
    )  # fmt: skip
    return group
