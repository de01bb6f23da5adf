"""`l2p evaluate scores`: the scorers' results as one table beside the source's."""

from __future__ import annotations

import argparse
import json

from ..l2p_core.files.atomic import write_bytes
from .console import table
from .image_benchmarks import scores


def scores_command(args: argparse.Namespace) -> None:
    """Print the table, and for each benchmark a sentence on the share kept.

    Raises:
        ValueError: for files that are not results of a benchmark that both sides have.
    """
    rows, notes = scores.table(map(scores.read, args.pixel), map(scores.read, args.source))
    header = ("benchmark and task", "source", "pixel model", "kept")
    print(table(header if args.source else (header[0], header[2]), [_cells(row, bool(args.source)) for row in rows]))
    for note in notes:
        print(note)
    for row in rows:
        if row.task == scores.OVERALL and row.kept is not None:
            print(f"{row.benchmark}: {row.pixel:.4f}, the source {row.source:.4f}; kept: {row.kept:.0%}")
    if args.json:
        found = [vars(row) | {"kept": row.kept} for row in rows]
        write_bytes(args.json, json.dumps(found, indent=1).encode())
        print(f"{args.json} written.")


def _cells(row: scores.ScoreRow, beside_source: bool) -> list[str]:
    name, pixel = f"{row.benchmark}: {row.task}", f"{row.pixel:.2%}"
    if not beside_source:
        return [name, pixel]
    source = "" if row.source is None else f"{row.source:.2%}"
    return [name, source, pixel, "" if row.kept is None else f"{row.kept:.0%}"]
