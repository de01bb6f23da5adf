"""The report of `l2p benchmark gpu`: one Markdown table and one JSON file, rewritten after every row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...l2p_core.files.atomic import atomic_file
from ...l2p_core.files.units import bytes_text
from ..console import table
from ..own_folder import OwnFolder
from .gpu_measure import Figures

_TITLE = "`l2p benchmark gpu`"


def _number(digits: int) -> Callable[[Any], str]:
    return lambda value: f"{value:.{digits}f}"


COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("value", "", str),
    ("ms", "ms", _number(1)),
    ("after", "after the backward pass, ms", _number(1)),
    ("rounds", "rounds", str),
    ("error", "relative error", lambda value: f"{value:.1e}"),
    ("peak", "allocator's peak", bytes_text),
    ("reserved", "reserved", bytes_text),
    ("beyond", "peak compared", bytes_text),
    ("predicted", "predicted", bytes_text),
    ("ratio", "ratio", _number(2)),
    ("kernels", "kernels", str),
    ("kernel_ms", "kernels, ms", _number(1)),
    ("copies", "copies", str),
    ("copy_ms", "copies, ms", _number(1)),
    ("hidden", "copying hidden", lambda value: f"{value:.0%}"),
    ("waits", "waits", str),
    ("items", "values read back", str),
    ("note", "", str),
)
"""The columns: each with its figure, its heading, and its format."""

_BYTES = ("peak", "resident", "reserved", "beyond", "predicted", "planned", "computer", "in_computer", "memory")
UNITS = {
    **dict.fromkeys(("ms", "ms_all", "after", "kernel_ms", "copy_ms"), "milliseconds"),
    **dict.fromkeys(_BYTES, "bytes"),
    **dict.fromkeys(("rounds", "kernels", "copies", "waits", "items", "count"), "count"),
    **dict.fromkeys(("error", "ratio", "hidden"), "fraction"),
    "seconds": "seconds",
}
"""The units of the numbers in gpu.json."""

_SHOWN = 8  # of the longest kernels; gpu.json has more

LEGEND = """\
- *ms*: median of the rounds, after a warm-up round. Sampling steps are queued behind each other as in sampling, several
  a round. A training step consists of all its micro-batches; *after the backward pass* is the part of a further one
  that no computing on the device hides: stepping weights in RAM, and copying them.
- *peak compared*: the allocator's peak, for sampling and the head beyond what was allocated before (weights), for
  training in total; *predicted* is our own plan of the same, *ratio* is measured over predicted.
- *relative error*: in `golden` against the reference named in the row; in `sampling` against the same step computed as
  published; for the head against its first row.
- *kernels*, *copies*, *waits* (stream and event synchronisations) and single *values read back* from the device are of
  one step, from torch's profiler, which slows that step down. Their *ms* are those during which at least one is
  running. *copying hidden* is the share of copying during which a kernel runs. If no device reports kernels, the CPU's
  operations are counted."""


def with_ratio(figures: Figures) -> Figures:
    """The figures with the ratio of measured to predicted memory, if both are known."""
    if figures.get("predicted") and figures.get("beyond"):
        return figures | {"ratio": figures["beyond"] / figures["predicted"]}
    return figures


def markdown(about: dict[str, Any], results: dict[str, Figures]) -> str:
    """The table, its title and its legend."""
    shown = [column for column in COLUMNS if any(figures.get(column[0]) is not None for figures in results.values())]
    rows = []
    for key, figures in results.items():
        cells = [_cell(figures, column) for column in shown]
        rows.append([key, *cells, _cell_text(figures.get("failed", ""))])
    header = ["row", *(heading for _, heading, _ in shown), "failed"]
    title = f"{_TITLE}, {about['when']}, l2p {about['version']}"
    if about["quick"]:
        title += " (quick check, small sizes: a check that it runs, not a measurement)"
    weights = "random weights" if about["model"] is None else f"weights of {Path(about['model']).name}"
    where = [about[name] for name in ("device", "software") if name in about]  # unless no process could start
    summary = "; ".join([*where, f"{weights}, {about['seconds']:.0f} s in total"])
    return "\n\n".join([title, summary, table(header, rows), LEGEND, *_longest(results)]) + "\n"


def _longest(results: dict[str, Figures]) -> list[str]:
    """The longest kernels of the rows whose kernels are counted."""
    texts = []
    for key, figures in results.items():
        lines = [
            f"- {kernel['ms']:.2f} ms, {kernel['count']} times: `{kernel['kernel']}`"
            for kernel in figures.get("longest", [])[:_SHOWN]
        ]
        texts += ["\n".join([f"The longest kernels of {key}:", "", *lines])] if lines else []
    return texts


def _has_report(folder: Path) -> bool:
    """Whether this benchmark of an earlier version wrote the folder's report."""
    try:
        with (folder / "gpu.md").open("rb") as file:
            return file.read(len(_TITLE)) == _TITLE.encode()
    except OSError:
        return False


FOLDER = OwnFolder("l2p benchmark gpu", "benchmark-gpu.txt", _has_report, ("gpu.md", "gpu.json"))


def write(folder: Path, about: dict[str, Any], results: dict[str, Figures]) -> None:
    """Write gpu.md and gpu.json, atomically."""
    texts = {
        "gpu.json": json.dumps({**about, "units": UNITS, "rows": results}, indent=1) + "\n",
        "gpu.md": markdown(about, results),
    }
    for name, text in texts.items():
        data = text.encode()
        with atomic_file(folder / name, len(data), overwrite=True) as file:
            file.write(data)


def _cell(figures: Figures, column: tuple[str, str, Callable[[Any], str]]) -> str:
    value = figures.get(column[0])
    return "" if value is None else _cell_text(column[2](value))


def _cell_text(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
