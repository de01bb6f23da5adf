"""The commands about prompts: write, rewrite and check them."""

from __future__ import annotations

import argparse

from ..l2p_core import ranges
from ..l2p_core.files.paths import typed
from .arguments import Commands, Number, command


def add_prompts(commands: Commands) -> None:
    """`l2p prompts`."""
    parser = command(commands, "prompts", "write prompts for a data set with your own language model, or check a list")
    kinds = parser.add_subparsers(title="what to do", metavar="KIND", required=True)
    _add_write(kinds)
    _add_rewrite(kinds)
    _add_check(kinds)


def _add_write(kinds: Commands) -> None:
    parser = command(kinds, "write", "write new prompts of the published kinds, balanced; run it again to resume")
    _add_folder(parser)
    parser.add_argument(
        "--count", type=Number(ranges.COUNT), default=10_000, metavar="N",
        help="number of prompts; 10000, as published, take a 4B model hours; a larger number later adds to the list",
    )  # fmt: skip
    _add_model(parser)

    def run(args: argparse.Namespace) -> None:
        from .prompts import write_command

        write_command(args)

    parser.set_defaults(command=run)


def _add_rewrite(kinds: Commands) -> None:
    parser = command(kinds, "rewrite", "rewrite short prompts in the published style; run it again to resume")
    parser.add_argument(
        "file", type=typed, metavar="FILE", help="text file with one prompt per line, or a table with a column prompt"
    )
    _add_folder(parser)
    _add_model(parser)

    def run(args: argparse.Namespace) -> None:
        from .prompts import rewrite_command

        rewrite_command(args)

    parser.set_defaults(command=run)


def _add_check(kinds: Commands) -> None:
    parser = command(kinds, "check", "check the prompts of a list: length, language, format, duplicates")
    parser.add_argument(
        "file", type=typed, metavar="FILE", help="text file with one prompt per line, or a table with a column prompt"
    )
    parser.add_argument("--report", type=typed, default=None, metavar="FILE.html", help="also write a report")
    parser.add_argument(
        "--output", type=typed, default=None, metavar="FILE.csv", help="also write the prompts without a problem"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")

    def run(args: argparse.Namespace) -> None:
        from .prompts import check_command

        check_command(args)

    parser.set_defaults(command=run)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "output", type=typed, metavar="FOLDER", help="folder for prompts.csv, report.html and journal.jsonl"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the language model, one of these")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--model", default=None, metavar="FOLDER",
        help="model on disk that follows instructions, as transformers saves it, such as Qwen3-4B; or the folder in "
        "which Z-Image was published, which has one",
    )  # fmt: skip
    which.add_argument(
        "--server", default=None, metavar="ADDRESS",
        help="OpenAI-compatible server on this machine, such as http://127.0.0.1:8080 (llama.cpp, Ollama, LM Studio, "
        "vLLM)",
    )  # fmt: skip
    writing = parser.add_argument_group("writing")
    writing.add_argument("--seed", type=Number(ranges.SEED), default=0, help="seed of the texts")
    writing.add_argument(
        "--temperature",
        type=Number(ranges.TEMPERATURE),
        default=0.9,
        help="of sampling; lower is safer, higher is freer",
    )
    writing.add_argument(
        "--at-once", type=Number(ranges.WORKERS), default=1, metavar="N",
        help="texts at a time: a batch with --model, parallel requests with --server",
    )  # fmt: skip
    disk = parser.add_argument_group("with --model")
    disk.add_argument("--device", default=None, help="torch device, such as cpu or cuda (default: a GPU if any)")
    disk.add_argument("--download", action="store_true", help="download MODEL, a name on the Hugging Face hub")
    server = parser.add_argument_group("with --server")
    server.add_argument("--name", default=None, help="the model's name there (default: its only one)")
    server.add_argument(
        "--tokens", type=Number(ranges.TOKENS), default=400, help="maximum tokens of an answer, including thinking"
    )
    server.add_argument(
        "--patience", type=Number(ranges.SECONDS), default=60, metavar="SECONDS",
        help="how long to wait for a server that does not answer",
    )  # fmt: skip
    server.add_argument("--remote", action="store_true", help="allow an ADDRESS of another machine")
