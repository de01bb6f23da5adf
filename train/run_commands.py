"""The commands on recipes: cache, plan and train."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..l2p_core.files.paths import typed
from .arguments import MODEL_HELP, Commands, command, positive, positive_number

if TYPE_CHECKING:
    from .run import PathOverrides

_DEVICE = "torch device, such as cpu, cuda:1 or xpu (default: a GPU if there is one)"


def add_cache(commands: Commands) -> None:
    """`l2p cache`."""
    parser = command(commands, "cache", "check a recipe's images and encode their captions before training")
    _add_recipe(parser)
    parser.add_argument("--device", default=None, help=f"device of the text encoder: {_DEVICE}")

    def run(args: argparse.Namespace) -> None:
        from .run import cache

        cache(args.recipe, args.output, _paths(args), device=args.device)

    parser.set_defaults(command=run)


def add_plan(commands: Commands) -> None:
    """`l2p plan`."""
    parser = command(commands, "plan", "estimate a recipe's memory, disk space and time without loading anything")
    _add_recipe(parser, output=False)
    parser.add_argument(
        "--gpu-memory", type=positive_number, default=None, metavar="GB", help="memory of the GPU that it must fit into"
    )
    parser.add_argument(
        "--processes", type=positive, default=1, metavar="N", help="processes that train together, one GPU each"
    )
    parser.add_argument("--cards", action="store_true", help="print which settings make it fit into common GPUs")

    def run(args: argparse.Namespace) -> None:
        from .plan import plan_command

        plan_command(args.recipe, _paths(args), args.gpu_memory, args.cards, args.processes)

    parser.set_defaults(command=run)


def add_train(commands: Commands) -> None:
    """`l2p train`."""
    parser = command(commands, "train", "train a recipe; run it again to resume from the last save")
    _add_recipe(parser)
    parser.add_argument("--restart", action="store_true", help="begin anew; the existing run is moved into a subfolder")
    parser.add_argument("--device", default=None, help=_DEVICE)

    def run(args: argparse.Namespace) -> None:
        from .run import train

        train(args.recipe, args.output, args.restart, _paths(args), device=args.device)

    parser.set_defaults(command=run)


def _add_recipe(parser: argparse.ArgumentParser, output: bool = True) -> None:
    """The recipe, and options that override its paths."""
    parser.add_argument(
        "recipe", metavar="RECIPE", help="TOML file, name of a bundled recipe such as 'tiny', or run folder to resume"
    )
    if output:
        parser.add_argument(
            "--output", type=typed, default=None, help="run folder (default: runs/<name of the recipe>)"
        )
    parser.add_argument("--base", default=None, help=f"replaces the recipe's [model] base: {MODEL_HELP}")
    parser.add_argument("--data", default=None, metavar="FOLDER", help="replaces the recipe's [data] path")
    parser.add_argument("--encoder", default=None, metavar="PATH", help="replaces the recipe's [captions] encoder")


def _paths(args: argparse.Namespace) -> PathOverrides:
    from .run import PathOverrides

    return PathOverrides(args.base, args.data, args.encoder)
