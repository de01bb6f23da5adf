"""Pieces of the command line that several commands share."""

from __future__ import annotations

import argparse
import math

from ..l2p_core.paths import typed

MODEL_HELP = "safetensors file, folder of shards, or 'tiny' for the bundled source"

Commands = argparse._SubParsersAction  # argparse has no public name for it


def command(commands: Commands, name: str, text: str) -> argparse.ArgumentParser:
    """A command that says in its help what it does and which values it takes by default."""
    return commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def add_recipe(parser: argparse.ArgumentParser, output: bool = True) -> None:
    """The recipe, and what may stand in for its paths."""
    parser.add_argument(
        "recipe", metavar="RECIPE", help="TOML file, name of a bundled recipe such as 'tiny', or run folder to go on in"
    )
    if output:
        parser.add_argument(
            "--output", type=typed, default=None, help="run folder (default: runs/<name of the recipe>)"
        )
    parser.add_argument("--base", default=None, help=f"in place of the recipe's [model] base: {MODEL_HELP}")
    parser.add_argument("--data", default=None, metavar="FOLDER", help="in place of the recipe's [data] path")
    parser.add_argument("--encoder", default=None, metavar="PATH", help="in place of the recipe's [captions] encoder")


def positive(text: str) -> int:
    """A whole number above 0."""
    number = int(text) if text.lstrip("+-").isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number


def positive_number(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number
