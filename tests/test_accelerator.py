"""Training on a device with memory of its own, on a simulated one (see `accelerator/simulated.py`), against the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from comfyui_l2p.l2p_core.checkpoint import load_tensors
from comfyui_l2p.l2p_core.deltas.delta_on_base import open_merged
from comfyui_l2p.l2p_core.device import accelerator
from comfyui_l2p.l2p_core.memory.placement import Form
from comfyui_l2p.l2p_core.run.folder import RunFolder
from comfyui_l2p.l2p_core.tiny import bundled
from comfyui_l2p.l2p_core.tiny.shapes import IMAGE_SIZE
from comfyui_l2p.train.sample_memory import Need

FOLDER = Path(__file__).with_name("accelerator")
sys.path.insert(0, str(FOLDER))

import simulated  # noqa: E402

pytestmark = pytest.mark.skipif(simulated.why_not() is not None, reason=str(simulated.why_not()))

RECIPE = """
[model]
base = "tiny"
head_width = 0.25

[data]
images = 8
steps = 1
batch_size = 2

[training]
blocks = 2
steps = 3
accumulate = 1
precision = "fp32"
stream = true
offload = true

[watch]
save_every = 2
montage_every = 3
prompts = ["a red circle in the centre on a white background"]
steps = 2
"""


TAKEN = """
import sys, torch
from comfyui_l2p.l2p_core.training.trainer import Trainer
from comfyui_l2p.train.cli import main

train_step = Trainer._train_step

def taken(trainer, batches):
    if trainer.step == 2:
        torch.ops.simulated_accelerator.set_limit(torch.npu.memory_allocated() + 100_000)
    return train_step(trainer, batches)

Trainer._train_step = taken
sys.exit(main(sys.argv[1:]))
"""


COMMANDS = """
import contextlib, gc, io, json, sys, torch
from comfyui_l2p.train.cli import main

results = []
for limit, arguments in json.loads(sys.argv[1]):
    gc.collect()
    left = torch.npu.memory_allocated()  # by the command before
    torch.ops.simulated_accelerator.set_limit(left + limit if limit else 2**62)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(arguments)
    results.append((code, said.getvalue()))
print(json.dumps(results))
"""
"""Several commands in one process, each with another size of the device's memory: most of a process is its start."""


@cache
def scenes() -> dict[str, dict[str, Any]]:
    done = run([str(FOLDER / "scenes.py")])
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return result


def found(scene: str) -> dict[str, Any]:
    return scenes()[scene]


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def train(recipe: Path, output: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "comfyui_l2p.train", "train", str(recipe), "--output", str(output), *arguments]
    return run(command, PYTHONPATH=str(FOLDER), **environment)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("devices mixed", "on the same device"),
        ("a copy not waited for", "has not waited for it"),
        ("memory overwritten in use", "has not waited for it"),
        ("a copy read too early", "had not arrived"),
        ("too much memory", "out of memory"),
    ],
)
def test_it_shows_mistakes_that_a_cpu_does_not(mistake: str, said: str) -> None:
    assert said in found("mistakes")[mistake]


def test_demos_and_benchmarks_sample_a_model_that_is_there() -> None:
    assert found("tiny images")["difference"] < 1e-4


@pytest.mark.parametrize("way", [
    "plain", "nothing twice", "streamed fp8, some blocks kept", "stepped early", "offloaded and streamed",
    "offloaded and streamed, two micro-batches", "all layers offloaded and streamed", "adapters", "bf16",
])  # fmt: skip
def test_every_way_of_training_comes_to_the_same_weights_there(way: str) -> None:
    trained = found("training")[way]
    # A bfloat16 product rounds otherwise where a tensor lies otherwise in memory.
    assert trained["difference"] < (2e-3 if way == "bf16" else 1e-6)
    assert trained["accelerator"] == pytest.approx(trained["cpu"], rel=1e-4 if way == "bf16" else 1e-6)
    assert trained["cpu"][0] != trained["cpu"][-1]


def test_streamed_blocks_that_change_on_their_way_are_read_right() -> None:
    assert found("streaming")["right"]


def test_the_stream_stays_bfloat16_under_autocast() -> None:
    """Autocast would widen it at the first norm where torch is new, and the head's maps where they grow."""
    dtypes = found("precision")
    assert {"Block", "RMSNorm", "decoder stage", "Block, gradient"} <= dtypes.keys()
    inside = {kind: of for kind, of in dtypes.items() if not kind.startswith("RMSNorm")}
    assert set(sum(inside.values(), [])) == {"torch.bfloat16"}, dtypes


def test_a_step_waits_once() -> None:
    """Whatever the number of its micro-batches and of its weights."""
    assert found("waits") == {way: [1, 1] for way in ("four micro-batches", "stepped early", "offloaded and streamed")}


@pytest.mark.parametrize("settings", [
    {"precision": "fp32", "size": 256, "step_early": True},
    {"precision": "fp32", "size": 256, "frozen": "fp8", "stream": True, "offload": True},
    {"precision": "bf16", "size": 64, "frozen": "fp8", "stream": True, "offload": True, "accumulate": 2, "dim": 256},
    {"precision": "bf16", "size": 128, "frozen": "fp8", "stream": True, "offload": True, "dim": 256},
], ids=["stepped early", "fp8 streamed, offloaded", "bf16, two batches", "bf16, mostly activations"])  # fmt: skip
def test_its_memory_is_within_15_percent_of_the_plan(settings: dict[str, object]) -> None:
    script = Path(__file__).with_name("measured_training.py")
    done = run([str(script), json.dumps({**settings, "device": simulated.NAME})], PYTHONPATH=str(FOLDER))
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["measured"] == pytest.approx(measured["planned"], rel=0.15), measured


def test_the_command_line_trains_on_it_as_on_the_cpu(recipe: Path, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    for output, arguments in ((there, []), (here, ["--device", "cpu"])):
        done = train(recipe, output, *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
    runs = [RunFolder(output) for output in (there, here)]
    assert ["GPU memory" in folder.plan.read_text("utf-8") for folder in runs] == [True, False]
    (ours, _), (theirs, _) = (load_tensors(folder.delta) for folder in runs)
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name].float() - theirs[name].float()).abs().max()) for name in ours) < 1e-2
    assert len(runs[0].montages()) == 1


def test_what_its_memory_does_not_hold_is_refused_with_what_would_fit(recipe: Path, tmp_path: Path) -> None:
    text = RECIPE.replace("stream = true\noffload = true\n", "").replace("batch_size = 2", "batch_size = 8")
    recipe.write_text(text, encoding="utf-8")
    done = train(recipe, tmp_path / "run", SIMULATED_ACCELERATOR_BYTES=str(20 * 10**6))
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "GPU memory" in done.stderr and "It would fit with" in done.stderr


def test_memory_that_runs_out_all_the_same_is_one_sentence_and_nothing_is_lost(recipe: Path, tmp_path: Path) -> None:
    """Another program takes the device's memory in the middle of the third step."""
    output = tmp_path / "run"
    done = run(["-c", TAKEN, "train", str(recipe), "--output", str(output)], PYTHONPATH=str(FOLDER))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "memory ran out" in done.stderr and "The last save is kept" in done.stderr
    assert RunFolder(output).delta.is_file()
    done = train(recipe, output)
    assert done.returncode == 0 and "Resuming after step 2 of 3" in done.stderr, done.stderr[-3000:]


def sampled(tries: dict[Path, tuple[int | None, list[str]]]) -> list[tuple[int, str]]:
    """Exit code and errors of `l2p sample` into each file, with this limit of the device's memory and these options."""
    caption = "a red circle in the centre on a white background"
    command = ["sample", "tiny", "--prompt", caption, "--steps", "3"]
    given = [(limit, [*command, *more, "--output", str(output)]) for output, (limit, more) in tries.items()]
    done = run(["-c", COMMANDS, json.dumps(given)], PYTHONPATH=str(FOLDER))
    assert done.returncode == 0, done.stderr[-3000:]
    return [(code, said) for code, said in json.loads(done.stdout.splitlines()[-1])]


def test_the_command_line_samples_on_it_as_on_the_cpu(tmp_path: Path) -> None:
    names = {"there": [], "named": ["--device", "npu:0"], "here": ["--device", "cpu"], "other": ["--device", "npu:1"]}
    done = sampled({tmp_path / f"{name}.png": (None, arguments) for name, arguments in names.items()})
    assert [code for code, _ in done] == [0, 0, 0, 2], done
    pixels = [torch.from_numpy(np.array(Image.open(tmp_path / f"{name}.png"))).int() for name in list(names)[:3]]
    assert torch.equal(pixels[0], pixels[1]) and int((pixels[0] - pixels[2]).abs().max()) <= 1
    assert "no device 'npu:1': it has cpu, npu." in done[3][1]


@pytest.mark.parametrize("form", ["whole", "fp8", "streamed", "streamed fp8"])
def test_every_form_of_weights_takes_what_is_planned_and_computes_the_same(form: str) -> None:
    measured = found("sampling")[form]
    assert measured["difference"] < 1e-5
    assert measured["loaded"] == pytest.approx(measured["planned"], rel=0.02)
    assert measured["peak"] <= measured["planned peak"] * 1.02


def needed(form: Form) -> int:
    """Bytes with which the bundled model samples in a form."""
    config = open_merged(bundled.DELTA, bundled.SOURCE).checkpoint.pixel_config()
    return Need(config, IMAGE_SIZE, IMAGE_SIZE, torch.float32).on_device(form)


def test_sampling_takes_the_form_and_the_place_that_there_is_memory_for(tmp_path: Path) -> None:
    forms = {
        "kept in bf16 (": Form(torch.bfloat16),
        "kept in fp8 (": Form(torch.bfloat16, float8=True),
        "kept in bf16, streamed from RAM": Form(torch.bfloat16, streamed=True),
    }
    assert needed(Form(torch.float32)) > needed(Form(torch.bfloat16)) > needed(Form(torch.bfloat16, float8=True))
    little = 50 * 10**6
    tries: dict[Path, tuple[int | None, list[str]]] = {
        tmp_path / f"{number}.png": (needed(form), ["--device", "npu"]) for number, form in enumerate(forms.values())
    }
    done = sampled({**tries, tmp_path / "cpu.png": (little, []), tmp_path / "no.png": (little, ["--device", "npu"])})
    for target, said, (code, errors) in zip(tries, forms, done[:3], strict=True):
        assert code == 0 and said in errors and target.is_file(), errors
    assert done[3][0] == 0 and "runs on the CPU" in done[3][1] and (tmp_path / "cpu.png").is_file()
    assert done[4][0] == 2 and "0.1 GB free" in done[4][1] and "--device cpu" in done[4][1]


def test_without_one_training_is_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "accelerator", None, raising=False)
    assert accelerator.default_device() == torch.device("cpu")
