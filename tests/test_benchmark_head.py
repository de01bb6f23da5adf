"""The head benchmark measures what it says, at sizes of no meaning."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from comfyui_l2p.l2p_core.device.process_memory import peak_memory
from comfyui_l2p.train.benchmark import head, process


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "DIM", 8)


@pytest.mark.usefixtures("narrow")
def test_both_layouts_compute_the_same() -> None:
    found = head.compare_layouts(64, rounds=1)
    assert found["relative_error"] < 1e-5
    assert found["speedup"] == pytest.approx(found["contiguous_s"] / found["ours_s"])


@pytest.mark.usefixtures("narrow")
def test_tiles_compute_the_same() -> None:
    found = head.compare_tiles(320, tile=71, rounds=1)
    assert found["relative_error"] < 1e-5
    assert found["tile"] == 160


def test_memory_of_the_whole_image_lies_on_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_module(_: str, size: str, *tile: str) -> dict[str, float]:
        return {"seconds": 1.0, "peak": 500 if tile else 100 + int(size) ** 2}

    monkeypatch.setattr(head, "run_module", run_module)
    found = head.compare_memory(40, tile=8, whole_sizes=(10, 20))
    assert found["whole_peak_extrapolated"] == 1700
    assert found["share"] == pytest.approx(500 / 1700)


def test_peak_memory_is_this_process_and_grows() -> None:
    before = peak_memory()
    # Twice the peak so far, and every page of it touched.
    torch.ones(2 * before, dtype=torch.uint8)
    assert peak_memory() >= before + before // 2


def test_a_failed_measurement_says_why() -> None:
    with pytest.raises(RuntimeError, match="invalid int value"):
        process.run_module("comfyui_l2p.train.benchmark.head", "large")


def test_the_report_names_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    same = {"relative_error": 1e-7, "size": 64, "tile": 32, "odd_tile": 7}
    monkeypatch.setattr(
        head, "compare_layouts", lambda *_, **__: same | {"ours_s": 1.0, "contiguous_s": 1.5, "speedup": 1.5}
    )
    monkeypatch.setattr(
        head, "compare_tiles", lambda *_, **__: same | {"whole_s": 2.0, "tiled_s": 2.5, "time_ratio": 1.25}
    )
    memory = {"tiled_peak": 10**9, "tiled_s": 3.0, "whole_sizes": [16, 32], "whole_peaks": [10**8, 2 * 10**8]}
    memory |= {"whole_peak_extrapolated": 2 * 10**10, "share": 0.05, "size": 64, "tile": 32}
    monkeypatch.setattr(head, "compare_memory", lambda *_, **__: memory)
    (tmp_path / "head.json").write_text("earlier", encoding="utf-8")
    os.link(tmp_path / "head.json", tmp_path / "earlier")
    head.benchmark_head(quick=True, json_file=tmp_path / "head.json")
    text = capsys.readouterr().out
    for number in ("1.50", "1.25", "1.0e-07", "20 GB", "1 GB", "5%"):
        assert number in text
    assert json.loads((tmp_path / "head.json").read_text(encoding="utf-8"))["memory"] == memory
    assert (tmp_path / "earlier").read_text(encoding="utf-8") == "earlier", "it is replaced when the new one is whole"
