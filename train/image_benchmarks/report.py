"""The report on a benchmark's images: settings, progress, examples, and how to score them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...l2p_core.dataset.images import opened
from ...l2p_core.files.atomic import write_bytes
from ...l2p_core.files.paths import quoted
from ...l2p_core.run.metrics import duration
from ...l2p_core.run.page import facts, jpeg_url, page, spread, text
from .benchmarks import PER_PROMPT, Shot
from .layouts import BenchmarkFolder, DpgFolder

_SHOWN = 24
_SIDE = 384  # pixels of a picture on the page
_SCORERS = {
    "geneval": "python evaluation/evaluate_images.py {folder} --outfile results.jsonl --model-path DETECTOR_FOLDER",
    "dpg": "python dpg_bench/compute_dpg_bench.py --image-root-path {folder} --resolution {side} --pic-num 4 "
    "--res-path results.txt",
}
"""The scorers' own commands, in their repositories."""


def write(made: BenchmarkFolder, now: int, seconds: float) -> Path:
    """Write the report into the folder beside the images; returns its path.

    Args:
        made: the images.
        now: how many of them the last run made.
        seconds: the time that took.

    Raises:
        ValueError: if it cannot be written.
    """
    target = made.beside / "report.html"
    write_bytes(target, page(f"{made.benchmark.title}: {made.folder.name}", _parts(made, now, seconds)))
    return target


def _parts(made: BenchmarkFolder, now: int, seconds: float) -> Iterator[str]:
    done, total = len(made.done), len(made.wanted)
    missing = "1 image is" if total - done == 1 else f"{total - done} images are"
    state = "All images are there." if done == total else f"{missing} missing; run it again for the rest."
    yield f"<h1>{text(made.benchmark.title)}</h1><p><strong>{text(state)}</strong></p>"
    prompts = total // PER_PROMPT
    rows = [
        ("Images", f"{done} of {total}, {PER_PROMPT} for each of {prompts} prompts"),
        (
            "Prompts as published",
            f"{made.benchmark.count}" + ("" if prompts == made.benchmark.count else ", so others"),
        ),
        *((name.capitalize(), value) for name, value in made.settings.items() if value),
        ("Made by the last run", f"{now} images in {duration(seconds)}"),
    ]
    yield facts(rows)
    side = next(iter(_sides(made)), "SIDE")
    command = _SCORERS[made.benchmark.key].format(folder=quoted(Path(made.folder.name)), side=side)
    yield f"<h2>Scoring</h2><p>In the benchmark's own repository:</p><pre>{text(command)}</pre>"
    yield "<p>Then <code>l2p evaluate scores RESULTS --source RESULTS_OF_THE_SOURCE</code> compares them.</p>"
    if shown := _shown(made):
        yield f"<h2>Images</h2><p>The first of each of {len(shown)} prompts.</p>"
        yield '<div class="tiles">' + "".join(_figure(made, shot) for shot in shown) + "</div>"


def _shown(made: BenchmarkFolder) -> list[Shot]:
    """First images of prompts that are spread over the list."""
    first = [shot for shot in made.done if shot.number == 0 and made.finished(shot).is_file()]
    return [first[i] for i in spread(len(first), _SHOWN)]


def _figure(made: BenchmarkFolder, shot: Shot) -> str:
    with opened(made.finished(shot), ("PNG",)) as image:
        url = jpeg_url(image.convert("RGB"), _SIDE)
    return f'<figure><img alt="{text(shot.name)}" src="{url}"><figcaption>{text(shot.prompt)}</figcaption></figure>'


def _sides(made: BenchmarkFolder) -> Iterator[int]:
    """The side of the images, from the first file that there is."""
    for shot in made.done:
        if made.finished(shot).is_file():
            with opened(made.finished(shot), ("PNG",)) as image:
                yield image.width // (2 if isinstance(made, DpgFolder) else 1)
