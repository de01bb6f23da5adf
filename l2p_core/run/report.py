"""A run's report: one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..dataset.images import opened
from ..files.atomic import write_bytes
from ..training.step_metrics import HIGH_SIGMA
from .chart import chart
from .folder import RunFolder
from .metrics import duration, loss_by_sigma, read_metrics

POINTS = 100
"""Maximum points of a curve; each is the mean over a window of steps."""
_SAMPLES = 40
"""Minimum steps of a window, if the run is long enough: a sample's loss varies tenfold with its noise level."""
MONTAGES = 8
"""Maximum montages shown: the first, the last and some between."""
_MOST_TEXT = 1 << 18  # bytes of the tables and curves
_WIDEST = 1536  # pixels that a montage is shrunk to

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --shade: #f4f4f4; --line: #ddd; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #1b1b1d; --shade: #29292c; --line: #444; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td { padding: .15rem 1.2rem .15rem 0; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; } svg { max-width: 100%; height: auto; }
figure { margin: 0 0 1.5rem; } img { max-width: 100%; }
pre { background: var(--shade); padding: .8rem; overflow-x: auto; font-size: 13px; }
"""


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
    parts = [f"<h1>{_text(folder.path.resolve().name)}</h1>", f"<p><strong>{_text(status)}</strong></p>"]
    if steps:
        parts += [_facts(steps), '<div class="charts">', *_charts(steps), "</div>"]
    parts += _montages(folder, prompts)
    for title, path in (("Recipe", folder.recipe), ("Plan", folder.plan), ("Left out", folder.problems)):
        if path.exists():
            parts.append(f"<h2>{title}</h2><pre>{_text(path.read_text(encoding='utf-8'))}</pre>")
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{viewport}<title>{_text(folder.path.resolve().name)}</title><style>{_STYLE}</style>'
    page = f'<!doctype html><html lang="en"><head>{head}</head><body>' + "\n".join(parts) + "</body></html>\n"
    write_bytes(folder.report, page.encode())


def most_bytes(width: int, height: int) -> int:
    """Bytes that a report has at most, its montages of so many pixels."""
    shrunk = min(1.0, _WIDEST / width)
    picture = 4 * round(shrunk * width) * round(shrunk * height)  # three bytes a pixel, which the page spells in four
    return MONTAGES * picture + _MOST_TEXT


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
    return "<table>" + "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows) + "</table>"


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
    yield f"<h2>Montages</h2><p>In reading order: {_text(' | '.join(prompts))}</p>"
    count = min(MONTAGES, len(found))
    chosen = {round(i * (len(found) - 1) / max(1, count - 1)) for i in range(count)} | {len(found) - 1}
    for i in sorted(chosen, reverse=True):
        step = int(found[i].stem.removeprefix("montage-"))
        image = f'<img alt="step {step}" src="{_data_url(found[i])}">'
        yield f"<figure><figcaption>Step {step}</figcaption>{image}</figure>"


def _data_url(path: Path) -> str:
    """A picture inside the page; large ones are reduced and stored as JPEG, or a report would have hundreds of
    megabytes."""
    with opened(path, ("PNG",)) as image:
        if image.width <= _WIDEST:
            return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        image.thumbnail((_WIDEST, 1 << 16))
        content = io.BytesIO()
        image.convert("RGB").save(content, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _text(text: str) -> str:
    return html.escape(text)
