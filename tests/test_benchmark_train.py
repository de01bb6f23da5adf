"""The training benchmark compares ways that do the same, at sizes of no meaning."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from comfyui_l2p.l2p_core.config import ModelConfig
from comfyui_l2p.train.benchmark import train
from comfyui_l2p.train.benchmark.plain_trainer import StandIn, tokens

CPU = torch.device("cpu")
SCALE = train.TrainingScale(
    ModelConfig(
        dim=64, head_dim=16, n_layers=5, n_refiner_layers=1, ffn_dim=96, caption_dim=64, t_hidden_dim=64
    ).with_head("1k", head_width=0.125),
    side=32,
    batch=2,
    steps=4,
)


def test_our_way_takes_the_same_steps_as_the_plain_one(tmp_path: Path) -> None:
    train.prepare(tmp_path, SCALE)
    plain = [loss for loss, _ in train._steps(train.PLAIN, tmp_path, "fp32", CPU, SCALE)]
    for way in ("ours", "ours, fp8, early steps", "ours, the same, no checkpointing"):
        ours, left = zip(*train._steps(way, tmp_path, "fp32", CPU, SCALE), strict=True)
        # Frozen weights in float8 are a little off.
        assert list(ours) == pytest.approx(plain, rel=0.02 if "fp8" in way else 1e-5)
        assert (left[-1] > 0) == train.OURS[way].get("offload", False)
    assert len(set(plain)) == SCALE.steps, "each step must have had its own samples"


def test_the_stand_in_is_as_large_as_asked_and_reads_its_words() -> None:
    encoder = StandIn(64, 700_000)
    numbers = sum(parameter.numel() for parameter in encoder.parameters())
    assert abs(numbers - 700_000) < 30_000
    red, blue = (encoder(tokens(f"a {colour} circle")) for colour in ("red", "blue"))
    assert red.shape == (3, 64) and not red.equal(blue) and not red.requires_grad


def test_ways_take_turns_step_by_step(tmp_path: Path) -> None:
    train.prepare(tmp_path, train._QUICK)
    taken = train.in_turns([train.PLAIN, "ours"], (str(tmp_path), "fp32", "cpu", "--quick"), train.WARM_UP + 2)
    plain, ours = taken[train.PLAIN], taken["ours"]
    assert len(plain["seconds"]) == len(ours["seconds"]) == 2 and min(*plain["seconds"], *ours["seconds"]) > 0
    assert len(plain["losses"]) == train.WARM_UP + 2 and ours["losses"] == pytest.approx(plain["losses"], rel=1e-5)


def test_a_way_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)plain.*init\.safetensors"):
        train.in_turns([train.PLAIN], (str(tmp_path), "fp32", "cpu", "--quick"), 1)


def test_the_report_names_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_module(_: str, way: str, *rest: str, env: object = None) -> dict[str, float]:
        return {"memory": 8e9, "device": 8e9} if way == train.PLAIN else {"memory": 7e9, "device": 4e9}

    def in_turns(ways: list[str], *_: object) -> dict[str, dict[str, list[float]]]:
        # The machine halves its speed after a turn: ratios are those of the turns.
        return {
            way: {"seconds": [4.0, 8.0] if way == train.PLAIN else [3.0, 6.0], "losses": [1.0, 0.25]} for way in ways
        }

    monkeypatch.setattr(train, "run_module", run_module)
    monkeypatch.setattr(train, "in_turns", in_turns)
    monkeypatch.setattr(train, "prepare", lambda *_: 58_000_000)
    (tmp_path / "train.json").write_text("earlier", encoding="utf-8")
    os.link(tmp_path / "train.json", tmp_path / "earlier")
    train.benchmark_train(quick=True, precision="fp32", device="cpu", json_file=tmp_path / "train.json")
    text = capsys.readouterr().out
    for number in ("6.00 s", "4.50 s", "0.75", "0.75 to 0.75", "8 GB", "7 GB", "4 GB", "0.50", "0.2500", "58M", "fp32"):
        assert number in text
    ways = json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))["ways"]
    assert ways.keys() >= {train.PLAIN, "ours"}
    assert (tmp_path / "earlier").read_text(encoding="utf-8") == "earlier", "it is replaced when the new one is whole"
