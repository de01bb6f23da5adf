"""Output of the command line: tables, progress bars, sizes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from ..l2p_core.distributed.launch import speaks
from ..l2p_core.files.tensor_io import ProgressCallback
from ..l2p_core.training.step_metrics import StepMetrics

_MEMORY = 0.95  # of the running means: about the last 20 steps


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([first, *others])} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(header), f"|{rule}|", *(line(row) for row in rows)])


def count_text(number: int) -> str:
    """A number of parameters: 6.17B, 10.1M, 830K."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


@contextmanager
def byte_progress(text: str) -> Iterator[ProgressCallback]:
    """A bar for work that reports (bytes done, total bytes)."""
    with bar(text, unit="B", unit_scale=True) as shown:
        yield lambda done, total: _advance(shown, done, total)


@contextmanager
def count_progress(text: str, unit: str) -> Iterator[ProgressCallback]:
    """A bar for work that reports (items done, total items)."""
    with bar(text, unit=unit) as shown:
        yield lambda done, total: _advance(shown, done, total)


def bar(text: str, **options: object) -> tqdm:
    """A progress bar on standard error, so that it does not mix with results."""
    return tqdm(desc=text, file=sys.stderr, dynamic_ncols=True, disable=not speaks(), **options)


def note(sentence: str) -> None:
    """Print a sentence on standard error, above progress bars."""
    tqdm.write(sentence, file=sys.stderr)


def _advance(shown: tqdm, done: int, total: int) -> None:
    shown.total = total
    shown.update(done - shown.n)


@contextmanager
def train_progress(total: int, done: int, text: str = "training") -> Iterator[Callable[[StepMetrics], None]]:
    """A bar over training steps with running means of the loss, and of the loss at sigma above 0.6."""
    means: dict[str, float] = {}

    def show(metrics: StepMetrics) -> None:
        for name, value in (("loss", metrics.loss), ("sigma>0.6", metrics.high_sigma_loss)):
            if value is not None:
                means[name] = value + _MEMORY * (means.get(name, value) - value)
        shown.set_postfix({name: f"{value:.4f}" for name, value in means.items()}, refresh=False)
        shown.update()

    with bar(text, unit="step", total=total, initial=done) as shown:
        yield show
