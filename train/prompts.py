"""`l2p prompts`: prompts for a data set."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from ..l2p_core.dataset import prompts
from ..l2p_core.files.atomic import check_target, write_bytes
from ..l2p_core.files.paths import quoted
from ..l2p_core.prompts import checking, outputs, reasons, report, rewriting, scheme, work
from ..l2p_core.prompts.writer import Writer
from .console import bar, note, table
from .interrupt import deferred_interrupt


def write_command(args: argparse.Namespace) -> None:
    """Write the missing prompts.

    Raises:
        ValueError: for an unusable model or folder, or a model that writes no prompts.
        KeyboardInterrupt: after Ctrl-C or a signal that ends the process; the prompts so far are in the folder.
    """
    _work(args, scheme.slots(args.count))


def rewrite_command(args: argparse.Namespace) -> None:
    """Rewrite the prompts of a file that are not yet rewritten; raises like `write_command`."""
    slots = rewriting.slots(prompts.read(args.file))
    _note_comments(args.file)
    _work(args, slots)


def _note_comments(path: Path) -> None:
    if path.is_file() and (skipped := prompts.skipped(path)):
        print(skipped, file=sys.stderr)


def check_command(args: argparse.Namespace) -> None:
    """Print what is wrong with the prompts of a file.

    Raises:
        ValueError: if it cannot be read, or a result cannot be written.
    """
    for path, suffix in ((args.report, ".html"), (args.output, ".csv")):
        if path:
            _check_name(path, suffix)
            check_target(path, args.overwrite)
    found = checking.check(prompts.read_all(args.file))
    _note_comments(args.file)
    counts = Counter(reason for one in found for reason in one.reasons)
    good = [one.text for one in found if not one.reasons]
    rows = [[reasons.TEXTS[reason], str(counts[reason])] for reason in reasons.TEXTS if counts[reason]]
    lengths = sorted(len(one.text) for one in found)
    print(table(["prompts", str(len(found))], [*rows, ["without a problem", str(len(good))]]))
    print(f"\nCharacters: {lengths[0]} to {lengths[-1]}, median {lengths[(len(lengths) - 1) // 2]}.")
    if args.report:
        write_bytes(args.report, report.of_check(args.file.name, found))
    if args.output:
        write_bytes(args.output, outputs.table([(text, "", "", "") for text in good]))


def _check_name(path: Path, suffix: str) -> None:
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path} must end in {suffix}.")


def _work(args: argparse.Namespace, slots: Sequence[scheme.Slot]) -> None:
    writer = _writer(args, lambda: interrupt.requested)
    with deferred_interrupt() as interrupt, bar("prompts", unit="prompt", total=len(slots)) as shown:

        def show(progress: work.PromptsProgress) -> None:
            if progress.seconds_left is None:
                shown.initial = progress.done  # what was there already says nothing about the time left
            shown.set_postfix(rejected=progress.rejected, refresh=False)
            shown.update(progress.done - shown.n)

        result = work.write(
            args.output,
            slots,
            writer,
            {"temperature": args.temperature},
            seed=args.seed,
            note=note,
            progress=show,
            stopped=lambda: interrupt.requested,
        )
    print(f"{args.output}: {result.summary()}")
    if result.prompts:
        print(f"For training images: l2p synth SOURCE FOLDER --prompts {quoted(args.output / outputs.TABLE)}")
    if result.stopped:
        raise KeyboardInterrupt


def _writer(args: argparse.Namespace, stopped: Callable[[], bool]) -> Writer:
    """The model that the arguments name, checked but not loaded; a server is not waited for once `stopped` is true."""
    if args.server:
        from .prompt_server import ServerWriter

        if args.download or args.device:
            raise ValueError("--download and --device belong to --model: the server has its own model and device.")
        return ServerWriter(
            args.server,
            args.name,
            temperature=args.temperature,
            at_once=args.at_once,
            patience=args.patience,
            remote=args.remote,
            tokens=args.tokens,
            stopped=stopped,
        )
    from .prompt_model import ModelWriter

    if args.name or args.remote:
        raise ValueError("--name and --remote belong to --server.")
    return ModelWriter(
        args.model, device=args.device, temperature=args.temperature, at_once=args.at_once, download=args.download
    )
