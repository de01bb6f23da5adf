"""`deterministic = true` and `compile = true`: settings of a run that its saves do not depend on."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from test_trainer import CONFIG, EMPTY, run, trainer
from tiny_models import pixel_model

from comfyui_l2p.l2p_core.device.determinism import CUBLAS, deterministic
from comfyui_l2p.l2p_core.memory import compiled
from comfyui_l2p.l2p_core.training.trainer import Trainer


def settings() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark, os.environ.get(CUBLAS)


def test_it_holds_for_the_block_and_what_was_set_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CUBLAS, raising=False)
    before = settings()
    with deterministic(False):
        assert settings() == before
    with deterministic(True):
        assert settings() == (True, True, False, ":4096:8")
    assert settings() == before
    monkeypatch.setenv(CUBLAS, ":16:8")
    with deterministic(True):
        assert settings()[-1] == ":16:8"
    assert settings()[-1] == ":16:8"


def test_what_torch_has_no_deterministic_way_for_is_said_in_a_sentence() -> None:
    before = settings()
    with (
        pytest.raises(ValueError, match=r"deterministic = true does not work here.*kthvalue CUDA"),
        deterministic(True),
    ):
        raise RuntimeError("kthvalue CUDA does not have a deterministic implementation, but you set 'torch. ...'")
    with pytest.raises(RuntimeError, match="another"), deterministic(True):
        raise RuntimeError("another thing")
    assert settings() == before


def test_a_run_is_resumed_compiled_and_deterministic_and_older_saves_know_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "check_compiler", lambda device: None)
    monkeypatch.setattr(compiled, "compile_blocks", partial(compiled.compile_blocks, backend="eager"))
    path, straight = tmp_path / "state.safetensors", run(trainer(), 4)
    first = trainer()
    run(first, 2)
    first.save(path)
    rest = Trainer(pixel_model(), dataclasses.replace(CONFIG, compile=True, deterministic=True), EMPTY)
    rest.resume(path)
    assert run(rest, 4) == pytest.approx(straight[2:], rel=1e-5)
    assert all("_orig_mod" not in name for name in rest.trained())
