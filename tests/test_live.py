"""What is shown of a run while it goes."""

from __future__ import annotations

import json
import math

from comfyui_l2p.l2p_core.run.live import POINTS, LossCurves, sentence
from comfyui_l2p.l2p_core.run.metrics import RunMetrics


def test_every_step_is_a_point_at_first() -> None:
    curves = LossCurves()
    curves.add(1, [2.0, 0, 0, 0, 6.0], [1, 0, 0, 0, 2])
    curves.add(2, [0, 0, 0, 0, 4.0], [0, 0, 0, 0, 1])
    shown = curves.as_json()
    assert shown["steps"] == [1, 2]
    assert [r["values"] for r in shown["ranges"]] == [[2.0, None], [None, None], [None, None], [None, None], [3.0, 4.0]]
    assert [r["high"] for r in shown["ranges"]] == [False, False, False, True, True]
    assert shown["ranges"][3]["name"] == "0.6 to 0.8"


def test_points_stay_few_and_their_means_exact() -> None:
    curves, steps = LossCurves(), 20 * POINTS + 3
    for step in range(1, steps + 1):
        curves.add(step, [float(step)] + [0.0] * 4, [1] + [0] * 4)
    shown = curves.as_json()
    ends = shown["steps"]
    assert POINTS / 2 <= len(ends) <= POINTS and ends[-1] == steps
    window = ends[0]
    assert window > 10 and all(b - a == window for a, b in zip(ends, ends[1:-1], strict=False))
    for end, value in zip(ends[:-1], shown["ranges"][0]["values"], strict=False):
        assert math.isclose(value, end - (window - 1) / 2, rel_tol=1e-4)


def test_a_loss_that_is_no_number_is_a_gap_and_the_message_is_json() -> None:
    curves = LossCurves()
    curves.add(1, [math.nan, math.inf, 1.0, 0, 0], [1, 1, 1, 0, 0])
    text = json.dumps(curves.as_json(), allow_nan=False)
    assert [r["values"] for r in json.loads(text)["ranges"]] == [[None], [None], [1.0], [None], [None]]


def test_where_a_run_stands_in_words() -> None:
    metrics = RunMetrics(5, 0.1, None, 1e-4, 1.0, 8, 0.5, steps=20, images_per_second=15.9, seconds_left=1800)
    assert sentence(metrics) == "Step 5 of 20, about 30 minutes left, 15.9 images per second"
    metrics.step, metrics.memory_bytes = 20, 2_500_000_000
    assert sentence(metrics) == "Step 20 of 20, 15.9 images per second, 2.50 GB at most"
