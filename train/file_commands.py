"""The commands on model files: inspect, convert, quantise, merge and delta."""

from __future__ import annotations

import argparse

from ..l2p_core import ranges
from ..l2p_core.files.paths import typed
from .arguments import MODEL_HELP, Commands, Number, add_about, add_unchecked_base, command


def add_inspect(commands: Commands) -> None:
    """`l2p inspect`."""
    parser = command(commands, "inspect", "show what a file is: layout, variant, sizes, dtypes, metadata")
    parser.add_argument("file", type=typed, metavar="FILE", help=MODEL_HELP)
    parser.add_argument("--keys", action="store_true", help="also list every tensor")
    parser.add_argument("--json", action="store_true", help="print JSON")

    def run(args: argparse.Namespace) -> None:
        from .inspect_file import inspect

        inspect(args.file, keys=args.keys, as_json=args.json)

    parser.set_defaults(command=run)


def add_convert(commands: Commands) -> None:
    """`l2p convert`."""
    parser = command(commands, "convert", "make a pixel initialisation from a latent model or a smaller variant")
    parser.add_argument("source", type=typed, metavar="SOURCE", help=MODEL_HELP)
    parser.add_argument("target", type=typed, metavar="TARGET", help="safetensors file to write")
    parser.add_argument("--variant", default="1k", help="1k, 4k, 8k or 10k")
    parser.add_argument("--seed", type=Number(ranges.SEED), default=0, help="seed of the new layers")
    parser.add_argument("--init", default="random", help="how the new layers are initialised: random, scaled or fitted")
    parser.add_argument(
        "--pairs", type=typed, default=None, metavar="FOLDER",
        help="for --init fitted: the folder that Synthesize L2P Dataset or `l2p synth tiny` made, or the file in it",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), default=None, help="dtype of all weights (default: as in SOURCE)"
    )
    parser.add_argument(
        "--head-width", type=Number(ranges.HEAD_WIDTH), default=1.0, metavar="FACTOR",
        help="factor on the channels of the Detailer Head",
    )  # fmt: skip
    parser.add_argument("--layout", choices=("comfy", "diffusers"), default="comfy", help="key layout of TARGET")
    parser.add_argument("--keys", action="store_true", help="print the fate of every key, not only the counts")
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET if it exists")
    add_about(parser)

    def run(args: argparse.Namespace) -> None:
        from .files import convert_command

        convert_command(args)

    parser.set_defaults(command=run)


def add_quantise(commands: Commands) -> None:
    """`l2p quantise`."""
    parser = command(commands, "quantise", "store a model in 8 bits, half of bf16's size, or in bf16")
    parser.add_argument("source", type=typed, metavar="SOURCE", help=f"L2P model, delta or latent source: {MODEL_HELP}")
    parser.add_argument("target", type=typed, metavar="TARGET", help="safetensors file to write")
    parser.add_argument(
        "--format", default="float8_e4m3fn", help="float8_e4m3fn or int8_tensorwise, ComfyUI's own formats, or bf16"
    )
    parser.add_argument(
        "--base",
        type=typed,
        default=None,
        metavar="BASE",
        help="base of SOURCE, if that is a delta",
    )
    add_unchecked_base(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET if it exists")
    add_about(parser)

    def run(args: argparse.Namespace) -> None:
        from .files import quantise_command

        quantise_command(args)

    parser.set_defaults(command=run)


def add_merge(commands: Commands) -> None:
    """`l2p merge`."""
    parser = command(commands, "merge", "merge a delta into its base, the pixel initialisation or the latent model")
    parser.add_argument("delta", type=typed, metavar="DELTA", help="delta that `l2p delta` or `l2p train` wrote")
    parser.add_argument("base", type=typed, metavar="BASE", help=MODEL_HELP)
    parser.add_argument("target", type=typed, metavar="TARGET", help="safetensors file to write")
    add_unchecked_base(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET if it exists")
    add_about(parser)

    def run(args: argparse.Namespace) -> None:
        from .files import merge_command

        merge_command(args)

    parser.set_defaults(command=run)


def add_delta(commands: Commands) -> None:
    """`l2p delta`."""
    parser = command(commands, "delta", "write only what training changed, as a small file to share")
    parser.add_argument("trained", type=typed, metavar="TRAINED", help="trained L2P model")
    parser.add_argument("base", type=typed, metavar="BASE", help=MODEL_HELP)
    parser.add_argument("target", type=typed, metavar="TARGET", help="safetensors file to write")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), default=None, help="dtype of the delta (default: as in TRAINED)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET if it exists")
    add_about(parser)

    def run(args: argparse.Namespace) -> None:
        from .files import delta_command

        delta_command(args)

    parser.set_defaults(command=run)
