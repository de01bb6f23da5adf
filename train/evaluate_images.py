"""`l2p evaluate images`: compares two folders of images, to measure what transfer keeps."""

from __future__ import annotations

import argparse

from ..l2p_core.evaluate import report
from ..l2p_core.evaluate.compare import compare
from ..l2p_core.evaluate.pairs import of_folders
from .console import count_progress, table
from .pictures import refuse_existing

HEADER = ("", "source", "pixel model", "kept")


def images_command(args: argparse.Namespace) -> None:
    """Compare the images, print the table and write the report.

    Raises:
        ValueError: for folders that do not belong together, unreadable images, or a report that exists already.
    """
    if args.output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{args.output.name} is not the name of an HTML page: end it in .html.")
    refuse_existing(args.output, args.overwrite)
    pairs, said = of_folders(args.source, args.pixel)
    with count_progress("measuring", "image") as progress:
        found = compare(pairs, args.patch, progress)
    notes = [*filter(None, [said]), f"Source: {args.source.name}. Pixel model: {args.pixel.name}."]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    report.write(args.output, found, "What transfer keeps", notes)
    print(report.summary(found), said)
    print(table(HEADER, report.table_rows(found)))
    print(f"{args.output} written.")
