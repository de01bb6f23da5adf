"""The whole of it, small: prompts, images, caption features, training that is killed and goes on, a delta, the host,
images, the judge."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import graphs
import numpy as np
import pytest
import torch
from host_server import Server
from test_server import picture

from comfyui_l2p.l2p_core.run.folder import RunFolder
from comfyui_l2p.l2p_core.run.metrics import read_metrics
from comfyui_l2p.l2p_core.tiny import judge
from comfyui_l2p.train.cli import main

CAPTIONS = [
    "a red circle in the centre on a white background",
    "a blue square in the centre on a black background",
    "a green triangle in the centre on a white background",
    "a yellow cross in the centre on a black background",
]
STEPS, SAVE_EVERY, PATIENCE_SECONDS = 50, 10, 300
RECIPE = f"""
[model]
base = "tiny"
head_width = 0.25
init = "scaled"

[data]
kind = "folder"
path = "images"
size = 64
batch_size = 8
workers = 1

[training]
steps = {STEPS}
lr = 2e-3
warmup_steps = 5
decay = "cosine"
ema_decay = 0.9
blocks = 2
precision = "fp32"
gradient_checkpointing = false
noise = "fresh"

[watch]
save_every = {SAVE_EVERY}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unflushed: None) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_prompts_to_images_that_the_judge_likes_better(server: Server, folder: Path) -> None:
    assert main(["synth", "tiny", "images", "--prompts", "prompts.txt", "--seeds", "3", "--steps", "6"]) == 0
    assert main(["cache", "recipe.toml", "--output", "run"]) == 0
    features = {path: path.stat().st_mtime_ns for path in (folder / "captions").rglob("*.safetensors")}
    assert len(features) == len(CAPTIONS) + 1

    run = RunFolder(folder / "run")
    kill_after(run, SAVE_EVERY + 2)
    assert run.state.exists() and len(read_metrics(run.metrics)) < STEPS
    assert main(["train", "run"]) == 0
    assert [line["step"] for line in read_metrics(run.metrics)] == list(range(1, STEPS + 1))
    assert features == {path: path.stat().st_mtime_ns for path in features}, "captions were encoded again"

    models = server.base / "models" / "diffusion_models"
    shutil.copy(run.delta, models / "end-to-end.safetensors")
    shutil.copy(run.init, models / "untrained.safetensors")
    trained = score(server, graphs.TINY, "end-to-end.safetensors")
    untrained = score(server, "untrained.safetensors")
    assert attributes(trained) > attributes(untrained) + 0.1
    assert trained.residual < untrained.residual - 0.1


def kill_after(run: RunFolder, steps: int) -> None:
    """Train in a process that is killed as soon as it has recorded so many steps."""
    command = [sys.executable, "-m", "comfyui_l2p.train", "train", "recipe.toml", "--output", "run"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not run.metrics.exists() or len(read_metrics(run.metrics)) < steps:
                assert process.poll() is None, "it ended by itself"
                assert time.monotonic() < deadline, "it does not train"
                time.sleep(0.02)
        finally:
            process.kill()


def score(server: Server, file: str, delta: str = "none") -> judge.Score:
    """Images of the captions, made in the host by L2P Loader and Pixel Sampler."""
    images = []
    for caption in CAPTIONS:
        graph = graphs.demo(model=["9", 0], batch_size=1, steps=10, cfg=1.0)
        graph["2"]["inputs"]["text"] = caption
        graph["9"] = graphs.loader(file, delta)["1"]
        images.append(torch.from_numpy(picture(server, server.run(graph), "5").astype(np.float32)))
    pixels = torch.stack(images).movedim(-1, 1) / 127.5 - 1
    return judge.score(pixels, CAPTIONS)


def attributes(score: judge.Score) -> float:
    return mean((score.shape, score.colour, score.place, score.background))
