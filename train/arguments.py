"""Parts of the command line that several commands share."""

from __future__ import annotations

import argparse

from ..l2p_core.files.atomic import check_target
from ..l2p_core.files.paths import typed
from ..l2p_core.ranges import COUNT, GIGABYTES, Range

_SHOWN = 40  # characters of a wrong value

MODEL_HELP = "safetensors file, folder of shards, or 'tiny' for the bundled source"

Commands = argparse._SubParsersAction  # argparse has no public name for it


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each option that has one and does not state it in its own text."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, []) or "(default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def command(commands: Commands, name: str, text: str) -> argparse.ArgumentParser:
    """A command whose help states what it does and its default values."""
    sentence = f"{text[0].upper()}{text[1:]}."
    return commands.add_parser(name, help=text, description=sentence, formatter_class=_Defaults, allow_abbrev=False)


def add_unchecked_base(parser: argparse.ArgumentParser) -> None:
    """The option to accept a base that cannot be checked."""
    parser.add_argument(
        "--unchecked-base",
        action="store_true",
        help="accept a quantised base that does not state what it was made from, if you know that it is the right one",
    )


def add_about(parser: argparse.ArgumentParser) -> None:
    """Metadata about a file's model, in addition to that of the files it is made from."""
    group = parser.add_argument_group("metadata about the model, which ComfyUI and model sites show")
    group.add_argument("--title", default=None, help="name of the model")
    group.add_argument("--author", default=None, help="who made it")
    group.add_argument("--license", default=None, help="license of the model")
    group.add_argument("--trigger-words", default=None, metavar="WORDS", help="words that prompts should contain")
    group.add_argument("--description", default=None, help="what it is")


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """The option to write results as JSON; call `check_json` before the work."""
    parser.add_argument("--json", type=typed, default=None, metavar="FILE", help=f"also write the {what} here")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE of --json if it exists")


def check_json(args: argparse.Namespace) -> None:
    """Refuse a file of `add_json` that exists, or cannot be written.

    Raises:
        ValueError: naming it.
    """
    if args.json:
        check_target(args.json, args.overwrite)


class Number:
    """An argument type: a number within a range, which a test reads from every option."""

    def __init__(self, allowed: Range):
        self.range = allowed

    def __call__(self, text: str) -> float:
        """The number; argparse shows the text of the error."""
        number = _parsed(text, self.range.whole)
        if number is None:
            wanted = "a whole number" if self.range.whole else "a number"
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text[:_SHOWN]!r}")
        problem = self.range.problem(number)
        if problem:
            raise argparse.ArgumentTypeError(f"must be {problem}, not {text[:_SHOWN]}")
        return number


def _parsed(text: str, whole: bool) -> float | None:
    try:
        return int(text) if whole else float(text)
    except ValueError:
        return None


positive = Number(COUNT)
positive_number = Number(GIGABYTES)
