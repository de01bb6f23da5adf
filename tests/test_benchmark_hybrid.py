"""The comparison of latents, pixels and both: its rows, its table, and that it resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from comfyui_l2p.l2p_core import delta, tiny
from comfyui_l2p.l2p_core.hybrid import levels
from comfyui_l2p.l2p_core.model import L2PModel
from comfyui_l2p.train.benchmark import hybrid


def test_rows_that_are_compared_have_equal_evaluations() -> None:
    pixels = delta.load_model(tiny.DELTA_PATH, tiny.SOURCE_PATH)
    assert isinstance(pixels, L2PModel)
    ways = hybrid.rows(tiny.load_source(), pixels)
    assert {row.evaluations for row in ways} == {12, 24}
    for row in ways:
        assert levels(row.stages, space_shift=row.shift)[-1][1] == 0


def test_the_benchmark_keeps_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    all_rows = hybrid.rows
    monkeypatch.setattr(hybrid, "rows", lambda *models: all_rows(*models)[:1])
    config = tiny.load_source().config
    monkeypatch.setattr(hybrid, "_real_costs", lambda: [hybrid._cost("latents", config, 64, 8)])
    hybrid.benchmark_hybrid(tmp_path, captions=1, seeds=2)
    first = (tmp_path / "results.md").read_text()
    assert "1 captions, 2 seeds" in first and "latents only, 6 steps" in first and "TFLOP" in first
    kept = tmp_path / "latents-only--6-steps-1-1.json"
    kept.write_text(json.dumps({"whole": 0.0, "distance": 1.0, "seconds": 1.0}))
    hybrid.benchmark_hybrid(tmp_path, captions=1, seeds=2)
    assert "50.0% ± 50.0" in (tmp_path / "results.md").read_text()
    assert "seed 0" in capsys.readouterr().out
