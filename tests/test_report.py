"""What a run shows: the report as one file, charts, TensorBoard events, metrics."""

from __future__ import annotations

import base64
import html.parser
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_run import folder, train  # noqa: F401 (a fixture)

from comfyui_l2p.l2p_core.run import report
from comfyui_l2p.l2p_core.run.chart import chart
from comfyui_l2p.l2p_core.run.events import Events
from comfyui_l2p.l2p_core.run.folder import RunFolder
from comfyui_l2p.l2p_core.run.loop import Run
from comfyui_l2p.l2p_core.run.metrics import Clock, RunMetrics, read_metrics
from comfyui_l2p.l2p_core.training.step_metrics import StepMetrics

pytestmark = pytest.mark.usefixtures("unflushed")


class Page(html.parser.HTMLParser):
    """Everything that a page loads."""

    def __init__(self, text: str):
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_a_run_leaves_one_file_that_opens_offline(folder: Path) -> None:  # noqa: F811
    made = train(folder, "run")
    text = made.report.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.loaded) == 1 and page.loaded[0].startswith("data:image/png;base64,")
    shown = Image.open(io.BytesIO(base64.b64decode(page.loaded[0].split(",")[1])))
    assert shown.tobytes() == Image.open(made.montage(4)).tobytes()
    assert not {"link", "script", "iframe"} & set(page.tags)
    assert "Finished after 4 of 4 steps." in text and "base = " in text
    assert page.tags.count("svg") == 7


def test_the_report_of_a_resumed_run_does_not_say_that_it_has_stopped(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = train(folder, "run", steps=2)
    monkeypatch.setattr(Run, "_save_if_due", lambda *_: False)  # nothing rewrites it before the end
    said: list[str] = []
    write = report.write

    def noted(place: RunFolder, status: str, prompts: Sequence[str]) -> None:
        said.append(status)
        write(place, status, prompts)

    monkeypatch.setattr(report, "write", noted)
    train(folder, "run", steps=3)
    assert said[0] == "Running: resumed after step 2 of 3."
    assert "Running: resumed" not in made.report.read_text(encoding="utf-8")


def test_a_short_runs_axis_has_each_step_once() -> None:
    root = ElementTree.fromstring(chart("Loss", [1, 2, 3, 4], {"a": [1.0, 2.0, 3.0, 4.0]}))
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text") if text.get("text-anchor") == "middle"]
    assert texts == ["1", "2", "3", "4"]


def test_metrics_say_how_fast_and_how_long(folder: Path) -> None:  # noqa: F811
    lines = read_metrics(train(folder, "run").metrics)
    assert [line["steps"] for line in lines] == [4] * 4
    assert all(line["images_per_second"] > 0 for line in lines)
    assert lines[0]["seconds_left"] > 0 and lines[-1]["seconds_left"] == 0
    assert lines[-1]["memory_bytes"] > 1e7


def test_time_left_is_that_of_the_steps_left(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.0, 14.0])
    monkeypatch.setattr("comfyui_l2p.l2p_core.run.metrics.time.perf_counter", lambda: next(times))
    clock = Clock(100, torch.device("cpu"))
    steps = [clock.add(StepMetrics(step, 1.0, None, 1e-3, 1.0, images=8, seconds=1.0)) for step in (1, 2)]
    assert [step.seconds_left for step in steps] == [198.0, 196.0]
    assert steps[1].images_per_second == 4.0


def test_a_chart_is_an_image_with_gaps() -> None:
    lines = {"a < b": [1.0, 0.5, math.nan, 0.25, 0.1], "one": [math.nan, math.nan, 2.0, math.nan, math.nan]}
    root = ElementTree.fromstring(chart("Loss & more", [1, 2, 3, 4, 5], lines, logarithmic=True))
    space = "{http://www.w3.org/2000/svg}"
    found = [element.get("points", "").split() for element in root.iter(f"{space}polyline")]
    assert [len(points) for points in found] == [2, 2]
    heights = [float(point.split(",")[1]) for points in found for point in points]
    assert heights == sorted(heights), "a falling line rises"
    # Halving is the same distance everywhere on a logarithmic scale.
    assert heights[1] - heights[0] == pytest.approx((heights[2] - heights[1]), abs=0.11)
    assert len(list(root.iter(f"{space}circle"))) == 1
    texts = [element.text for element in root.iter(f"{space}text")]
    assert "a < b" in texts and "Loss & more" in texts
    assert "polyline" not in chart("empty", [1], {"x": [math.nan]})


def test_a_report_shows_few_montages_and_shrinks_large_ones(tmp_path: Path) -> None:
    made = RunFolder(tmp_path)
    for step in range(1, 31):
        Image.new("RGB", (8, 8) if step < 30 else (4000, 2000), "red").save(made.montage(step))
    report.write(made, 'stopped <at> "once"', ["a & b"])
    text = made.report.read_text(encoding="utf-8")
    shown = [int(step) for step in re.findall(r"<figcaption>Step (\d+)<", text)]
    assert len(shown) == report.MONTAGES and shown[0] == 30 and shown[-1] == 1
    large = next(source for source in Page(text).loaded if source.startswith("data:image/jpeg"))
    assert Image.open(io.BytesIO(base64.b64decode(large.split(",")[1]))).width < 2000
    assert "stopped &lt;at&gt;" in text and "a &amp; b" in text


def metrics(step: int) -> RunMetrics:
    return RunMetrics(step, 0.5, None, 1e-3, 1.0, 2, 0.1, [0.5, 0, 0, 0, 0], [1, 0, 0, 0, 0], 10, 20.0, 1.0, 0)


def test_events_are_the_metrics(tmp_path: Path) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = Events(tmp_path, 0)
    for step in (1, 2, 3):
        first.add(metrics(step))
    first.add_montage(2, torch.zeros(2, 3, 8, 8))
    first.close()
    again = Events(tmp_path, 2)
    again.add(metrics(3))
    again.close()
    read = loading.EventAccumulator(str(tmp_path))
    read.Reload()
    assert [event.step for event in read.Scalars("loss")] == [1, 2, 3]
    assert read.Scalars("loss_by_sigma/0.0 to 0.2")[0].value == 0.5
    assert "high_sigma_loss" not in read.Tags()["scalars"]
    assert read.Images("montage")[0].width == 18


def test_without_tensorboard_there_are_no_events_and_one_line(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    made = train(folder, "run", steps=1)
    assert capsys.readouterr().err.count("TensorBoard is not installed") == 1
    assert not made.events.exists()


def test_a_disk_that_refuses_events_does_not_end_the_run(tmp_path: Path) -> None:
    class Refusing:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

    events = Events(tmp_path, 0)
    events.available, events._writer_class = True, Refusing
    events.add(metrics(1))
    events.flush()
    events.close()
    assert not events.available


def test_curves_are_means_over_enough_samples() -> None:
    assert report._window([{"images": 2}] * 4) == 1
    assert report._window([{"images": 1}] * 200) == 20
    assert report._window([{"images": 8}] * 200) == 5
    assert report._window([{"images": 8}] * 10_000) == 100
