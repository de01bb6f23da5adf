"""The commands that judge a pixel model: `l2p evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..l2p_core import ranges
from ..l2p_core.files.paths import typed
from .arguments import Commands, Number, add_json, add_unchecked_base, check_json, command
from .image_commands import add_encoder, add_sampling

_PROMPTS = {
    "geneval": ("GenEval", "evaluation_metadata.jsonl of your copy of GenEval, or its folder"),
    "dpg": ("DPG-Bench", "folder with the .txt files of your copy of DPG-Bench's prompts"),
}


def add_evaluate(commands: Commands) -> None:
    """`l2p evaluate`."""
    parser = command(
        commands, "evaluate", "judge a pixel model: benchmarks' images and scores, and what transfer keeps"
    )
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)
    _add_images(kinds)
    for key in _PROMPTS:
        _add_benchmark(kinds, key)
    _add_scores(kinds)


def _add_images(kinds: Commands) -> None:
    parser = command(kinds, "images", "compare the images of a source with those of the pixel model, in a report")
    parser.add_argument("source", type=typed, metavar="SOURCE", help="folder of the source's images")
    parser.add_argument("pixel", type=typed, metavar="PIXEL", help="folder of the pixel model's images")
    parser.add_argument("--output", type=typed, default=Path("evaluation.html"), metavar="FILE", help="the report")
    parser.add_argument(
        "--patch",
        type=Number(ranges.PATCH),
        default=16,
        help="side in pixels of the patches whose borders are measured",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the report if it exists")

    def run(args: argparse.Namespace) -> None:
        from .evaluate_images import images_command

        images_command(args)

    parser.set_defaults(command=run)


def _add_benchmark(kinds: Commands, key: str) -> None:
    title, prompts = _PROMPTS[key]
    parser = command(kinds, key, f"make the images of {title}, in the layout that its scorer reads")
    parser.add_argument("prompts", type=typed, metavar="PROMPTS", help=prompts)
    parser.add_argument(
        "output", type=typed, metavar="FOLDER", help="folder for the images; the report is written beside it"
    )
    parser.add_argument(
        "--model", type=typed, default=None, metavar="MODEL",
        help="L2P file or folder of shards; 'tiny' is the bundled pixel model, 'tiny-source' its source",
    )  # fmt: skip
    parser.add_argument("--delta", type=typed, default=None, help="delta to merge into MODEL, its base")
    add_unchecked_base(parser)
    parser.add_argument(
        "--workflow", type=typed, default=None, metavar="FILE",
        help="in place of --model: ComfyUI workflow in API format with {prompt} in a text",
    )  # fmt: skip
    parser.add_argument(
        "--host", action="append", default=[], metavar="ADDRESS", help="running ComfyUI; several share the work"
    )
    parser.add_argument(
        "--patience", type=Number(ranges.SECONDS), default=60, metavar="SECONDS",
        help="how long to wait for a host that does not answer",
    )  # fmt: skip
    parser.add_argument("--seed", type=Number(ranges.FIRST), default=42, help="seed, reset for every prompt")
    parser.add_argument(
        "--side", type=Number(ranges.SIDE), default=None, help="of the images in pixels (default: the variant's)"
    )
    add_encoder(parser)
    add_sampling(parser)
    parser.set_defaults(denoise=1.0)

    def run(args: argparse.Namespace) -> None:
        from .evaluate_benchmark import benchmark_command

        benchmark_command(args, key)

    parser.set_defaults(command=run)


def _add_scores(kinds: Commands) -> None:
    parser = command(kinds, "scores", "show the results of the benchmarks' scorers beside the source's")
    parser.add_argument(
        "pixel", type=typed, nargs="+", metavar="FILE", help="a scorer's result for the pixel model, one per benchmark"
    )
    parser.add_argument(
        "--source", type=typed, nargs="+", default=[], metavar="FILE", help="results for the source, same benchmarks"
    )
    add_json(parser, "table")

    def run(args: argparse.Namespace) -> None:
        from .evaluate_scores import scores_command

        check_json(args)
        scores_command(args)

    parser.set_defaults(command=run)
