"""The benchmark of bit depth measures what it says, after too few steps to mean anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from comfyui_l2p.l2p_core.dataset import images
from comfyui_l2p.train.benchmark import depth, ramp
from comfyui_l2p.train.cli import main


def test_errors_are_counted_in_levels_of_8_bits() -> None:
    levels = [0, 1000, 2000, 4095]
    off = torch.tensor([0.2, -0.24, 0.26, -3.0], dtype=torch.float64) / 255
    found = depth.errors(ramp.values(levels) + off, levels)
    assert found.share == 0.5 and found.median == pytest.approx(0.24) and found.ninth_decile > 0.26


def test_levels_differ_by_less_than_the_tolerance_and_so_do_their_files(tmp_path: Path) -> None:
    levels = [0, 1, 4094, 4095]
    ramp.write_folder(tmp_path, levels)
    for level, pixels in zip(levels, ramp.images(levels), strict=True):
        read = images.as_pixels(images.load(tmp_path / ramp.file_name(level), ramp.SIDE, ramp.SIDE))
        assert read.shape == (3, ramp.SIDE, ramp.SIDE) and ramp.SIDE**2 >= 64
        assert torch.allclose(read, pixels, rtol=0, atol=1e-7)
    first, second, *_ = ramp.values(levels).tolist()
    assert 0 < (second - first) * 255 < depth.TOLERANCE


def test_captions_of_levels_differ_and_are_equally_long() -> None:
    empty, first, second = ramp.LevelEncoder().encode(["", ramp.caption(17), ramp.caption(18)])
    assert first.shape == second.shape == empty.shape == (ramp.TOKENS, depth.CONFIG.caption_dim)
    assert not torch.equal(first, second) and not empty.any()
    assert first.norm().item() == pytest.approx(second.norm().item())


def test_a_model_that_knows_the_ramp_is_right(tmp_path: Path) -> None:
    """The exact velocity in place of the model: what is left is the error of sampling, writing and measuring."""
    levels = list(range(0, ramp.LEVELS, 128))
    encoded = ramp.LevelEncoder().encode([ramp.caption(level) for level in levels])
    by_caption = {tuple(caption.flatten().tolist()): level for level, caption in zip(levels, encoded, strict=True)}

    def exact(x: Tensor, sigma: Tensor, captions: list[Tensor]) -> Tensor:
        x0 = ramp.images([by_caption[tuple(caption.flatten().tolist())] for caption in captions])
        return (x - x0) / sigma[:, None, None, None]

    found = depth.errors(depth.sampled(exact, levels, tmp_path), levels)
    assert found.share == 1 and found.ninth_decile < 1e-2


def test_the_whole_benchmark_runs_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "depth"
    assert main(["benchmark", "depth", "--quick", "--output", str(output)]) == 0
    table = capsys.readouterr().out
    assert "| means within a quarter of an 8-bit level |" in table and "2 steps" in table
    assert len(list((output / "quick" / "sampled").iterdir())) == 16
    state = output / "quick" / "run" / "state.safetensors"
    saved = state.stat().st_mtime_ns
    assert main(["benchmark", "depth", "--quick", "--output", str(output)]) == 0
    assert capsys.readouterr().out == table  # nothing was trained again, and sampling is seeded
    assert state.stat().st_mtime_ns == saved
