"""A run's report: one self-contained HTML file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..files.atomic import write_bytes
from ..training.step_metrics import HIGH_SIGMA
from . import source_images
from .beside_source import beside_source
from .chart import chart
from .folder import RunFolder, montage_step
from .metrics import duration, loss_by_sigma, read_metrics
from .page import WIDEST, facts, page, png_url, spread, text

POINTS = 100
"""Maximum points of a curve; each is the mean over a window of steps."""
_SAMPLES = 40
"""Minimum steps of a window, if the run is long enough: a sample's loss varies tenfold with its noise level."""
MONTAGES = 8
"""Maximum montages shown: the first, the last and some between."""
_MOST_TEXT = 1 << 18  # bytes of the tables and curves


def write(folder: RunFolder, status: str, prompts: Sequence[str]) -> None:
    """Rewrite the report from the folder's metrics, montages and recipe, atomically.

    Args:
        folder: of the run.
        status: a sentence about the run's status.
        prompts: of the montages.

    Raises:
        ValueError: if it cannot be written.
    """
    steps = read_metrics(folder.metrics) if folder.metrics.exists() else []
    parts = [f"<h1>{text(folder.path.resolve().name)}</h1>", f"<p><strong>{text(status)}</strong></p>"]
    if steps:
        parts += [_facts(steps), '<div class="charts">', *_charts(steps), "</div>"]
    parts += _montages(folder, prompts)
    for title, path in (("Recipe", folder.recipe), ("Plan", folder.plan), ("Skipped", folder.problems)):
        if path.exists():
            parts.append(f"<h2>{title}</h2><pre>{text(path.read_text(encoding='utf-8'))}</pre>")
    write_bytes(folder.report, page(folder.path.resolve().name, parts))


def most_bytes(width: int, height: int) -> int:
    """Maximum bytes of a report whose montages have this many pixels each, with the source's images beside them."""
    shrunk = min(1.0, WIDEST / width)
    picture = 4 * round(shrunk * width) * round(shrunk * height)  # three bytes a pixel, which the page spells in four
    return 2 * MONTAGES * picture + _MOST_TEXT


def _facts(steps: Sequence[Mapping[str, Any]]) -> str:
    last = steps[-1]
    rows = [
        ("Step", f"{last['step']} of {last['steps']}"),
        ("Learning rate", f"{last['lr']:.3g}"),
        ("Images per second", f"{last['images_per_second']:.3g}"),
        ("Time left", duration(last["seconds_left"])),
        ("Time trained", duration(sum(step["seconds"] for step in steps))),
    ]
    if last["memory_bytes"]:
        rows.append(("Peak memory", f"{last['memory_bytes'] / 1e9:.2f} GB"))
    return facts(rows)


def _charts(steps: Sequence[dict[str, Any]]) -> list[str]:
    window = _window(steps)
    ends, curves = loss_by_sigma(steps, window)
    high = {name: curve for name, curve in curves.items() if float(name.split()[0]) >= HIGH_SIGMA}
    low = {name: curve for name, curve in curves.items() if name not in high}

    def mean(name: str, scale: float = 1.0) -> list[float]:
        values = [step[name] * scale if step[name] is not None else math.nan for step in steps]
        return [sum(values[end - window : end]) / window for end in range(window, len(steps) + 1, window)]

    return [
        chart(f"Loss at sigma above {HIGH_SIGMA}: watch this one", ends, high, logarithmic=True),
        chart(f"Loss at sigma up to {HIGH_SIGMA}, where skips can copy the input", ends, low, logarithmic=True),
        chart("Mean loss", ends, {"loss": mean("loss")}, logarithmic=True),
        chart("Gradient norm before clipping", ends, {"norm": mean("grad_norm")}, logarithmic=True),
        chart("Learning rate", ends, {"rate": mean("lr")}),
        chart("Images per second", ends, {"images": mean("images_per_second")}),
        chart("Peak memory so far, GB", ends, {"memory": mean("memory_bytes", 1e-9)}),
    ]


def _window(steps: Sequence[Mapping[str, Any]]) -> int:
    """Steps per point of the curves."""
    calm = min(math.ceil(_SAMPLES / steps[-1]["images"]), len(steps) // 10)
    return max(1, calm, math.ceil(len(steps) / POINTS))


def _montages(folder: RunFolder, prompts: Sequence[str]) -> Iterable[str]:
    found = folder.montages()
    if not found:
        return
    yield f"<h2>Montages</h2><p>In reading order: {text(' | '.join(prompts))}</p>"
    if said := source_images.said(folder):
        yield f"<p>{text(said)}</p>"
    for path in reversed([found[i] for i in spread(len(found), MONTAGES)]):
        step = montage_step(path)
        image = f'<img alt="step {step}" src="{beside_source(folder, path) or png_url(path)}">'
        yield f"<figure><figcaption>Step {step}</figcaption>{image}</figure>"
