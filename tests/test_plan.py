"""The memory plan: held to what is measured, and to what a user reads of it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn

from comfyui_l2p.l2p_core.config import ModelConfig
from comfyui_l2p.l2p_core.distributed.ranks import Ranks
from comfyui_l2p.l2p_core.distributed.together import go_together
from comfyui_l2p.l2p_core.memory import activations, block_store
from comfyui_l2p.l2p_core.memory import plan as plans
from comfyui_l2p.l2p_core.memory.activations import Moment, Peak, Step, Workload, peak, step_of
from comfyui_l2p.l2p_core.memory.checkpointing import kept_blocks, kept_sentence
from comfyui_l2p.l2p_core.memory.live_memory import trace
from comfyui_l2p.l2p_core.memory.plan import GB, plan
from comfyui_l2p.l2p_core.memory.room import Room, fitting, keeping_what_fits, memory_changes, refuse_if_too_much
from comfyui_l2p.l2p_core.run import memory_plan
from comfyui_l2p.l2p_core.run.memory_plan import decided, planned, workload
from comfyui_l2p.l2p_core.run.recipe import DataSection, ModelSection, Recipe
from comfyui_l2p.l2p_core.training.trainer import Trainer
from comfyui_l2p.l2p_core.training_config import TrainingConfig
from comfyui_l2p.train.benchmark.process import FREED_AT_ONCE
from comfyui_l2p.train.cli import main

Z_IMAGE = ModelConfig().with_head("1k")
PUBLISHED = TrainingConfig(accumulate=8)
AT_1024 = Workload(1, 1024, 1024, 512)
SMALL = tiny_models.SOURCE.with_head("1k", 0.125)
SMALL_WORK = Workload(2, 64, 32, 40)


def of_z_image(**choices: object) -> plans.MemoryPlan:
    return plan(Z_IMAGE, dataclasses.replace(PUBLISHED, **choices), AT_1024)  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform != "linux", reason="measures as Linux does")
@pytest.mark.parametrize("settings", [
    {"precision": "fp32", "size": 256},
    {"precision": "fp32", "gradient_checkpointing": False, "size": 256},
    {"precision": "fp32", "keep_activations": 7, "size": 256},
    {"precision": "fp32", "step_early": True, "size": 256},
    {"precision": "fp32", "frozen": "fp8", "stream": True, "offload": True, "size": 256},
    {"precision": "bf16", "size": 64},
], ids=["shallow", "nothing twice", "some blocks kept", "stepped early", "fp8 elsewhere", "bf16"])  # fmt: skip
def test_what_is_measured_is_within_15_percent_of_the_plan(settings: dict[str, object]) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("measured_training.py")), json.dumps(settings)],
        env={**os.environ, **FREED_AT_ONCE, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["measured"] == pytest.approx(found["planned"], rel=0.15), found


@pytest.mark.parametrize(("choices", "advice"), [
    ({"keep_activations": 30}, "start again with keep_activations = 0 to resume"),
    ({"offload": True}, "start again with stream = true to resume"),
    ({"offload": True, "stream": True}, "begin the run anew with size = "),
], ids=["activations kept", "offloaded", "offloaded and streamed"])  # fmt: skip
def test_after_memory_has_run_out_the_least_change_is_proposed(
    choices: dict[str, object], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan, "total_memory_and_swap", lambda: 128 * GB)
    training = dataclasses.replace(PUBLISHED, **choices)  # type: ignore[arg-type]
    recipe = Recipe(
        ModelSection("base"), DataSection(kind="folder", path="data", size=1024, batch_size=1), training=training
    )
    error = memory_plan.after_running_out(recipe, Z_IMAGE, Ranks(device=torch.device("cuda")))
    needed = of_z_image(**choices).device_bytes
    assert f"the plan was about {plans.gigabytes(needed)} GB" in str(error) and advice in str(error)


def test_a_trace_counts_what_lives_at_once() -> None:
    layers = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 50)).to("meta")
    x = torch.empty(10, 100, device="meta", requires_grad=True)
    found = trace(layers, [x], layers.parameters())
    hidden, output, weight = 4 * 10 * 200, 4 * 10 * 50, 4 * 200 * 100
    # Of the hidden numbers ReLU keeps its own output; those before it are let go of.
    assert found.output == output and found.retained == hidden + output
    # At the end: gradients of the input, of the hidden numbers and of the first weight.
    assert found.retained + output < found.peak <= 3 * hidden + 2 * output + 2 * weight
    assert all(weight.grad is None for weight in layers.parameters()) and x.grad is None


def test_the_worst_moment_of_a_step_is_found() -> None:
    step = Step(
        ("a", "b", ""),
        (90, 180, 270),
        (Moment(350, 2, 10), Moment(550, 1, 110), Moment(300, 0, 1110), Moment(5, 0, 1110)),
    )

    def found(recomputed: Callable[[str], bool], gradients: Callable[[int, int], int]) -> Peak:
        return peak(step, recomputed, gradients)

    assert found(lambda _: True, lambda made, total: 0) == Peak(550, 0)
    # What parts keep exists until the backward pass has come to them.
    assert found(lambda _: False, lambda made, total: 0) == Peak(550 + 90, 0)
    assert found(lambda block: block != "b", lambda made, total: 0) == Peak(550, 0)
    assert found(lambda _: True, lambda made, total: made) == Peak(300, 1110)
    assert found(lambda _: True, lambda made, total: total) == Peak(550, 1110)
    assert found(lambda _: True, lambda made, total: min(made, 5)) == Peak(550, 5)


@pytest.mark.parametrize("choices", [
    {}, {"precision": "fp32"}, {"policy": "lora", "lora_rank": 3}, {"policy": "all"},
    {"offload": True, "ema_decay": 0.9},
], ids=str)  # fmt: skip
def test_weights_and_states_are_counted_exactly(choices: dict[str, object]) -> None:
    config = TrainingConfig(blocks=1, **choices)  # type: ignore[arg-type]
    found = plan(SMALL, config, SMALL_WORK)
    trained = Trainer(tiny_models.pixel_model(), config)
    named = dict(trained.model.named_parameters())

    def size(tensors: object) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)  # type: ignore[attr-defined]

    place = found.ram if config.offload else found.device
    state = trained._weights.state()
    assert found.device["trained weights"] == size(trained.parameters.values())
    assert found.device["frozen weights"] == size(p for name, p in named.items() if name not in trained.parameters)
    assert place["optimiser"] == size(tensor for name, tensor in state.items() if name.startswith("exp_avg"))
    assert place["averages"] == size(trained._weights.averages.values())
    if not config.offload:
        complete = step_of(SMALL, config, SMALL_WORK).moments[-1].gradients
        assert complete == sum(weight.numel() for weight in trained.parameters.values())


@pytest.mark.parametrize("frozen", ["full", "fp8"])
@pytest.mark.parametrize("offload", [True, False])
def test_streamed_weights_are_counted_exactly(offload: bool, frozen: str) -> None:
    config = TrainingConfig(blocks=1, stream=True, offload=offload, frozen=frozen)
    model = Trainer(tiny_models.pixel_model(), config).model
    layer: Any = model.get_submodule("layers.1.attention.qkv")
    slots = sum(len(slot) for slot in layer.place._stream._slots)
    found = plan(SMALL, config, SMALL_WORK, device_type="cpu").device["streamed weights"]
    assert found == pytest.approx(block_store.bytes_in_ram(model) + slots, rel=0.01)  # places are aligned
    assert bool(block_store.trained_linears(model)) == offload


def test_the_6b_model_at_1024_fits_16_gb() -> None:
    assert (
        refuse_if_too_much(
            Z_IMAGE, dataclasses.replace(PUBLISHED, frozen="fp8", offload=True), AT_1024, Room(16 * GB)
        ).device["trained weights"]
        == 2 * 2_548_257_795
    )
    assert fitting(Z_IMAGE, PUBLISHED, AT_1024, Room(16 * GB)) is not None


def test_each_setting_saves_what_it_is_there_for() -> None:
    plain = of_z_image()
    assert plain.device["frozen weights"] > 1.9 * of_z_image(frozen="fp8").device["frozen weights"]
    streamed = of_z_image(frozen="fp8", stream=True)
    assert streamed.device["streamed weights"] < 0.5 * GB < 3 * GB < streamed.ram["streamed weights"]
    assert plain.device["optimiser"] > 3.9 * of_z_image(optimiser_bits=8).device["optimiser"]
    offloaded = of_z_image(offload=True)
    assert offloaded.device["trained weights"] == plain.device["trained weights"] // 2
    assert "optimiser" not in offloaded.device and offloaded.ram["optimiser"] == plain.device["optimiser"]
    both = of_z_image(offload=True, stream=True)
    assert both.device_bytes < 4.5 * GB < offloaded.device_bytes / 3
    assert both.ram["trained weights"] == offloaded.ram["trained weights"]
    assert of_z_image(offload=True, accumulate=1).ram["gradients"] < GB < offloaded.ram["gradients"]
    assert of_z_image(accumulate=1).device["gradients"] > 9 * GB
    assert of_z_image(accumulate=1, step_early=True).device["gradients"] == 0
    everything = of_z_image(gradient_checkpointing=False).device["activations"]
    assert everything > 5 * plain.device["activations"]
    some, all_blocks = (of_z_image(keep_activations=count).device["activations"] for count in (10, 30))
    assert plain.device["activations"] < some - 4 * GB and some < all_blocks - 8 * GB and all_blocks < everything
    assert of_z_image(keep_activations=-1) == plain
    shared = plan(Z_IMAGE, dataclasses.replace(PUBLISHED, parallel="fsdp"), AT_1024, processes=8)
    assert shared.device_bytes < plain.device_bytes / 3
    # Shards and replicas go straight to their devices.
    assert not shared.ram
    assert not plan(Z_IMAGE, dataclasses.replace(PUBLISHED, parallel="ddp"), AT_1024, processes=8).ram


def test_what_cannot_fit_is_refused_with_the_least_change_that_would() -> None:
    with pytest.raises(ValueError, match=r"Needs about 5[12]\.\d GB of GPU memory: frozen weights 7\.2, .* are 16"):
        refuse_if_too_much(Z_IMAGE, PUBLISHED, AT_1024, Room(16 * GB))
    with pytest.raises(ValueError, match=r'would fit with frozen = "fp8": then about 4\d\.\d GB\.$'):
        refuse_if_too_much(Z_IMAGE, PUBLISHED, AT_1024, Room(48 * GB))
    with pytest.raises(ValueError, match=r"would fit with keep_activations = 0: then about 5\d\.\d GB\.$"):
        refuse_if_too_much(Z_IMAGE, dataclasses.replace(PUBLISHED, keep_activations=30), AT_1024, Room(54 * GB))
    with pytest.raises(ValueError, match="No setting makes it fit"):
        refuse_if_too_much(Z_IMAGE, PUBLISHED, AT_1024, Room(GB))
    with pytest.raises(ValueError, match="offload = true and stream = true: then about 4.0 GB and 5"):
        refuse_if_too_much(Z_IMAGE, PUBLISHED, AT_1024, Room(8 * GB))
    with pytest.raises(ValueError, match="size = "):
        refuse_if_too_much(Z_IMAGE, PUBLISHED, AT_1024, Room(3 * GB))


def test_what_the_computer_has_no_room_for_is_refused_too() -> None:
    config = dataclasses.replace(PUBLISHED, frozen="fp8", offload=True)

    def ask(memory: int, limit: int = 16 * GB) -> None:
        refuse_if_too_much(Z_IMAGE, config, AT_1024, Room(limit, memory))

    ask(64 * GB)
    said = r"41\.0 GB of RAM.* and 32\.0 GB of .* optimiser_bits = 8: then about 12\.0 GB"
    with pytest.raises(ValueError, match=said):
        ask(32 * GB)
    with pytest.raises(ValueError, match="No setting makes it fit"):
        ask(16 * GB)
    with pytest.raises(ValueError, match=r"would fit with offload = false: then"):
        ask(16 * GB, limit=80 * GB)


def test_room_that_is_left_over_keeps_activations() -> None:
    asked = dataclasses.replace(PUBLISHED, keep_activations=-1)

    def keeps(memory: int) -> int:
        return keeping_what_fits(Z_IMAGE, asked, AT_1024, Room(memory * GB)).keep_activations

    assert 0 < keeps(70) < keeps(80) <= 30 and keeps(200) == 30
    twice = [keeping_what_fits(Z_IMAGE, asked, AT_1024, Room(gb * GB)).gradient_checkpointing for gb in (80, 200)]
    assert twice == [True, False]
    assert keeps(52) == 0, "it fits, but with little to spare"
    assert keeping_what_fits(Z_IMAGE, PUBLISHED, AT_1024, Room(200 * GB)) == PUBLISHED
    found, training = planned(recipe(keep_activations=-1), SMALL, Ranks(device=torch.device("cpu")))
    assert training.keep_activations == SMALL.n_layers
    assert found == plan(SMALL, training, workload(recipe(), SMALL, Ranks()), device_type="cpu")


def test_frozen_blocks_keep_theirs_first_and_of_these_the_last() -> None:
    def kept(count: int, **choices: object) -> list[int]:
        return sorted(kept_blocks(SMALL, TrainingConfig(blocks=1, keep_activations=count, **choices)))  # type: ignore[arg-type]

    assert SMALL.n_layers == 4
    assert [kept(count) for count in (-1, 0, 1, 2, 3, 4, 5)] == [
        [], [], [2], [1, 2], [1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]
    ]  # fmt: skip
    some = TrainingConfig(blocks=1, keep_activations=3)
    assert kept_sentence(SMALL, some) == " 3 of 4 blocks keep their activations and are not recomputed."
    assert kept(1, policy="all") == [3] and kept(1, policy="lora", lora_rank=2) == [2]


def test_changes_are_settings_first_and_smaller_batches_keep_the_step() -> None:
    found = list(memory_changes(dataclasses.replace(PUBLISHED, accumulate=2), AT_1024._replace(batch=4)))
    assert found[0].words == "" and found[0].training.accumulate == 2
    single = next(change for change in found if change.work.batch == 1)
    assert single.training.accumulate == 8 and single.words == "batch_size = 1 and accumulate = 8"
    huge = memory_changes(dataclasses.replace(PUBLISHED, accumulate=4096), AT_1024._replace(batch=4096))
    assert max(change.training.accumulate for change in huge) == 1_000_000, "what is advised may be asked for"
    assert not any("frozen" in change.words for change in memory_changes(TrainingConfig(policy="all"), AT_1024))
    several = [change.words for change in memory_changes(TrainingConfig(step_early=True), AT_1024._replace(batch=4))]
    assert "batch_size = 1 and accumulate = 4 and step_early = false" in several
    # Early steps are for one micro-batch, and part of offloading.
    assert not any("step_early" in change.words for change in found)
    early = [change for change in memory_changes(TrainingConfig(), AT_1024) if "step_early" in change.words]
    assert early and not any("offload" in change.words for change in early)


def recipe(**training: object) -> Recipe:
    data = DataSection(kind="folder", path="images", size=100, batch_size=4)
    return Recipe(ModelSection("x"), data, training=TrainingConfig(accumulate=1, **training))  # type: ignore[arg-type]


def test_large_batches_are_planned_as_if_they_had_been_run(monkeypatch: pytest.MonkeyPatch) -> None:
    work = SMALL_WORK._replace(batch=50)
    extrapolated = step_of(SMALL, TrainingConfig(blocks=1), work)
    monkeypatch.setattr(activations, "_IMAGES", 1000)
    activations._step.cache_clear()
    run = step_of(SMALL, TrainingConfig(blocks=1), work)
    activations._step.cache_clear()
    assert extrapolated.kept == run.kept and len(extrapolated.moments) == len(run.moments)
    for choice in (lambda _: True, lambda _: False):
        assert peak(extrapolated, choice, lambda made, _: made) == peak(run, choice, lambda made, _: made)


@pytest.mark.parametrize(("batch", "size"), [(100_000, 1024), (1_000_000, 1024), (1_000_000, 8192)])
def test_what_is_refused_is_refused_at_once(batch: int, size: int) -> None:
    """However much is asked: no number of operations grows with it."""
    large = Recipe(ModelSection("x"), DataSection(kind="folder", path="images", size=size, batch_size=batch))
    started = time.process_time()
    with pytest.raises(ValueError, match="There are|exceeds what any device can hold"):
        planned(large, SMALL, Ranks(device=torch.device("cpu")))
    assert time.process_time() - started < 10


def test_processes_are_replicas_where_these_fit() -> None:
    ranks = Ranks(0, 2, torch.device("cpu"))
    config = TrainingConfig(accumulate=1)
    work = workload(recipe(), SMALL, ranks)
    assert work == Workload(2, 96, 96, 512)
    replica, shard = (
        plan(SMALL, dataclasses.replace(config, parallel=kind), work, device_type="cpu", processes=2).device_bytes
        for kind in ("ddp", "fsdp")
    )
    assert planned(recipe(), SMALL, ranks)[1].parallel == "ddp"
    assert planned(recipe(), SMALL, ranks, limit=replica)[1].parallel == "ddp"
    assert planned(recipe(), SMALL, ranks, limit=max(shard, replica - 1))[1].parallel == "fsdp"
    with pytest.raises(ValueError, match=r"There are .* for each of 2 processes\."):
        planned(recipe(), SMALL, ranks, limit=shard // 100)


@pytest.mark.parametrize("choice", [{"compile": True}, {"optimiser_bits": 8}], ids=str)
def test_what_shards_cannot_do_is_refused_where_auto_comes_to_them(choice: dict[str, Any]) -> None:
    ranks, asked = Ranks(0, 2, torch.device("cpu")), recipe(**choice)
    work = workload(asked, SMALL, ranks)
    training = dataclasses.replace(asked.training, parallel="ddp")
    replica = plan(SMALL, training, work, device_type="cpu", processes=2).device_bytes
    assert planned(asked, SMALL, ranks, limit=replica)[1].parallel == "ddp"
    with pytest.raises(ValueError, match=r'"auto" chose "fsdp"\. .*(compile = true|optimiser_bits = 32)'):
        planned(asked, SMALL, ranks, limit=replica - 1)


def test_the_command_plans_the_6b_model_without_its_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "z-image-1k-16gb", "--gpu-memory", "16"]) == 0
    assert "the plan is for Z-Image as published" in (said := capsys.readouterr().out) and re.search(
        r"Needs about 1[12]\.\d GB", said
    )
    assert main(["plan", "z-image-1k", "--gpu-memory", "80"]) == 0
    assert re.search(r"\d of 30 blocks keep their activations", capsys.readouterr().out)
    assert main(["plan", "z-image-1k", "--gpu-memory", "16"]) == 2
    assert "It would fit with" in capsys.readouterr().err
    assert main(["plan", "z-image-1k", "--cards"]) == 0
    rows = capsys.readouterr().out.strip().splitlines()[-6:]
    assert [row.split("|")[1].strip() for row in rows] == ["8 GB", "12 GB", "16 GB", "24 GB", "48 GB", "80 GB"]
    assert main(["plan", "tiny"]) == 0 and "GPU memory" in capsys.readouterr().out
    assert main(["plan", "z-image-1k", "--base", "missing"]) == 2


def test_the_command_plans_several_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Replicas and shards side by side; with the GPU's memory the way that a run would take there."""
    monkeypatch.chdir(tmp_path)

    def said(*options: str, code: int = 0) -> str:
        assert main(["plan", "z-image-1k", *options]) == code
        out = capsys.readouterr()
        return out.err if code else out.out

    both = re.findall(r'Each of 8 processes, with parallel = "(\w+)": Needs about (\S+) GB', said("--processes", "8"))
    ways = {way: float(size) for way, size in both}
    assert 50 < ways["ddp"] < 53 and 9 < ways["fsdp"] < 11
    assert 'parallel = "fsdp": ' in said("--processes", "8", "--gpu-memory", "24")
    assert 'parallel = "ddp": ' in said("--processes", "8", "--gpu-memory", "80")
    assert "3 processes cannot share a step" in said("--processes", "3", code=2)
    rows = said("--processes", "8", "--cards").strip().splitlines()[-6:]
    assert [row.split("|")[2].strip() for row in rows] == ["`fsdp`"] * 5 + ["`ddp`"]
    assert main(["plan", "z-image-1k-16gb", "--processes", "2"]) == 2
    assert "offload = true" in capsys.readouterr().err


def test_what_is_advised_to_shards_they_can_do() -> None:
    """8-bit moments cannot be cut, and are no advice where the model is."""
    shared = dataclasses.replace(PUBLISHED, parallel="fsdp")
    gpu = torch.device("cuda")
    assert not go_together(dataclasses.replace(shared, optimiser_bits=8), 2, gpu)
    for memory in (8, 12, 16, 24):
        found = fitting(Z_IMAGE, shared, AT_1024, Room(memory * GB, processes=2))
        assert found is None or go_together(found[0].training, 2, gpu), found
    room = Room(GB, processes=2)
    eight = dataclasses.replace(PUBLISHED, optimiser_bits=8)
    with pytest.raises(ValueError, match='"auto" chose "fsdp"'):
        decided(Z_IMAGE, eight, AT_1024, room)
    assert decided(Z_IMAGE, PUBLISHED, AT_1024, room).parallel == "fsdp"


@pytest.mark.parametrize(("channels", "dtype", "copied"), [(3, torch.bfloat16, 8), (19, torch.bfloat16, 24),
                                                           (16, torch.bfloat16, 0), (3, torch.float32, 0)])  # fmt: skip
def test_copies_of_maps_that_convolutions_widen_are_counted(channels: int, dtype: torch.dtype, copied: int) -> None:
    """Their outputs are small here, so that the peak of the forward pass is the input's copy."""
    layer = torch.nn.Conv2d(channels, 8, 4, stride=4, device="meta", dtype=dtype)
    x = torch.empty(2, channels, 64, 64, device="meta", dtype=dtype)
    output, backward = 2 * 8 * 16 * 16 * dtype.itemsize, sum(p.nbytes for p in layer.parameters())
    traced = trace(layer, [x], layer.parameters())
    assert traced.output == traced.retained == output
    assert traced.peak == 2 * output + copied * 2 * 64 * 64 * dtype.itemsize + backward
