"""Two processes train what one process trains, and their saves are each other's."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_run
import torch
from distributed_scenes import CONFIG, STEPS, batches_of, run, scene_config, trainer
from tiny_models import RandomBatches, pixel_model
from torch import Tensor

from comfyui_l2p.l2p_core import delta
from comfyui_l2p.l2p_core.checkpoint import load_model, load_tensors, save
from comfyui_l2p.l2p_core.device import accelerator
from comfyui_l2p.l2p_core.distributed import ranks as parallel
from comfyui_l2p.l2p_core.distributed.ranks import Ranks
from comfyui_l2p.l2p_core.model import LatentModel
from comfyui_l2p.l2p_core.run.folder import RunFolder
from comfyui_l2p.l2p_core.run.metrics import read_metrics
from comfyui_l2p.train.run import train

FSDP = hasattr(torch.cpu.Stream, "record_event")
"""Whether this torch's FSDP2 works on CPUs."""
KINDS = ["ddp", *(["fsdp"] if FSDP else [])]
SCENES = ["ddp", "ddp_unpadded", "ddp_fp8", "auto_read"] + FSDP * [
    *("fsdp", "fsdp_lora_bf16", "fsdp_lora_fp8"),
    *("fsdp_read", "fsdp_lora_read_bf16", "fsdp_lora_read_fp8"),
]

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch cannot connect processes"),
    pytest.mark.usefixtures("unflushed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes left, having played all scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "scenes").write_text(" ".join(SCENES), encoding="utf-8")
    save(pixel_model().state_dict(), folder / "base.safetensors")
    for kind in KINDS:
        half = trainer(scene_config(kind))
        run(half, batches_of(kind, Ranks()), STEPS // 2)
        half.save(folder / f"single_{kind}_half.safetensors")
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("distributed_scenes.py")), str(folder)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=900)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank in range(2):
        assert (folder / f"done{rank}").exists(), said[rank]
    (folder / "lost").write_text(said[0], encoding="utf-8")
    return folder


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def alone(name: str, accumulate: int = 1) -> tuple[dict[str, Tensor], list[float]]:
    """State and metrics of one process that does the same steps in micro-batches of twice the size, or as many."""
    trained = trainer(dataclasses.replace(scene_config(name), accumulate=accumulate))
    data = RandomBatches(batch_size=4) if accumulate == 1 else batches_of(name, Ranks())
    said = run(trained, data)
    return trained._weights.state(), said


def error(state: dict[str, Tensor], path: Path) -> float:
    """The largest relative error (norm of difference over norm) of a saved tensor."""
    saved, _ = load_tensors(path)
    assert saved.keys() == state.keys()
    return max(float((saved[name] - value).norm() / value.norm().clamp(min=1e-30)) for name, value in state.items())


@pytest.mark.parametrize("name", [name for name in SCENES if "bf16" not in name and "read" not in name])
def test_two_processes_equal_one_with_the_doubled_batch(name: str, folder: Path) -> None:
    """To the rounding of sums in another order: 1e-5 for every weight, average and moment after two steps."""
    state, said = alone(name, accumulate=1 if name == "ddp" else 2)
    assert error(state, folder / f"{name}.safetensors") < 1e-5
    theirs = load_tensors(folder / f"{name}_said.safetensors")[0]["said"]
    assert torch.allclose(theirs, torch.tensor(said), rtol=1e-5, atol=0)
    assert all(norm > CONFIG.clip_norm for norm in said[1::3]), "nothing was clipped"


@pytest.mark.skipif(not FSDP, reason="this torch's FSDP2 needs a GPU")
def test_sharded_adapters_and_frozen_weights_in_bfloat16(folder: Path) -> None:
    """Weights are rounded to bfloat16 at other places than autocast does, so that only the losses are compared."""
    name = "fsdp_lora_bf16"
    state, said = alone(name, accumulate=2)
    theirs = load_tensors(folder / f"{name}_said.safetensors")[0]["said"]
    assert torch.allclose(theirs, torch.tensor(said), rtol=0.05)
    saved, _ = load_tensors(folder / f"{name}.safetensors")
    assert saved.keys() == state.keys() and all(value.dtype == torch.float32 for value in saved.values())
    assert any("lora_up" in key and bool(value.any()) for key, value in saved.items())


@pytest.mark.parametrize("name", [name for name in SCENES if "read" in name])
def test_a_model_read_block_by_block_trains_as_a_whole_one_bit_for_bit(name: str, folder: Path) -> None:
    """That no process holds it whole is asserted where it is read."""
    whole, _ = load_tensors(folder / f"{name.replace('_read', '').replace('auto', 'ddp')}.safetensors")
    by_parts, _ = load_tensors(folder / f"{name}.safetensors")
    assert whole.keys() == by_parts.keys()
    for key, value in whole.items():
        assert torch.equal(value, by_parts[key]), key


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_continues_bit_for_bit(kind: str, folder: Path) -> None:
    straight, _ = load_tensors(folder / f"{kind}.safetensors")
    resumed, _ = load_tensors(folder / f"{kind}_after_{kind}_half.safetensors")
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_runs_go_on_with_another_number_of_processes(kind: str, folder: Path) -> None:
    expected, _ = alone(kind, accumulate=2)
    assert error(expected, folder / f"{kind}_after_single_{kind}_half.safetensors") < 1e-5
    resumed = trainer(scene_config(kind))
    resumed.resume(folder / f"{kind}_half.safetensors")
    run(resumed, batches_of(kind, Ranks()))
    assert error(resumed._weights.state(), folder / f"{kind}.safetensors") < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_save_after_a_full_disk_is_whole(kind: str, folder: Path) -> None:
    first, _ = load_tensors(folder / f"{kind}.safetensors")
    again, _ = load_tensors(folder / f"{kind}_again.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.parametrize("kind", KINDS)
def test_averages_and_delta_are_those_of_the_state(kind: str, folder: Path) -> None:
    state, _ = load_tensors(folder / f"{kind}.safetensors")
    model = delta.load_model(folder / f"{kind}_delta.safetensors", folder / "base.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state.get(f"average.{name}", value)), name
    batch = RandomBatches().batch(0)
    with torch.no_grad():
        expected = model(batch.pixels, torch.tensor([0.3, 0.9]), batch.captions)
    velocity = load_tensors(folder / f"{kind}_velocity.safetensors")[0]["velocity"]
    assert torch.linalg.norm(velocity - expected) < 1e-5 * torch.linalg.norm(expected)
    assert not torch.equal(load_model(folder / "base.safetensors").x_embedder.weight, model.x_embedder.weight), (
        "nothing was trained"
    )


def test_a_lost_process_ends_the_others_with_a_sentence(folder: Path) -> None:
    last = (folder / "lost").read_text(encoding="utf-8").strip().splitlines()[-1]
    assert "ProcessLost: Process 0 of this run lost another process" in last


LEAVES = """
import os, sys
import torch.distributed as dist
from comfyui_l2p.l2p_core.distributed import ranks as parallel
from comfyui_l2p.l2p_core.distributed.ranks import ProcessLost
rank = os.environ["RANK"]
wrong = ValueError("a mistake") if rank == "0" else RuntimeError("NCCL error: Cuda failure 2 'out of memory'")
try:
    with parallel.process_group() as ranks:
        assert dist.is_initialized() and ranks.gather(rank) == ["0", "1"]
        raise wrong
except (ValueError, RuntimeError) as error:
    assert error is wrong, error
assert not dist.is_initialized(), "the group was left behind"
"""


def test_the_group_ends_however_the_block_does() -> None:
    """With a mistake in one process; in the other with memory that ran out, which is no lost process."""
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVES],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said


def test_memory_that_ran_out_is_no_lost_process() -> None:
    ran_out = "NCCL error in ProcessGroupNCCL.cpp, unhandled cuda error. Last error: Cuda failure 2 'out of memory'"
    for error in (RuntimeError(ran_out), torch.cuda.OutOfMemoryError("CUDA out of memory in NCCL"),
                  RuntimeError("[gloo] DefaultCPUAllocator: can't allocate memory")):  # fmt: skip
        assert not parallel.is_connection_error(error) and accelerator.is_out_of_memory(error)
    gone = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    assert parallel.is_connection_error(gone) and not accelerator.is_out_of_memory(gone)


@pytest.mark.parametrize(("accumulate", "batch_size", "count"), [(8, 1, 8), (2, 3, 2), (1, 4, 2), (4, 2, 8), (6, 2, 4)])
def test_the_samples_of_a_step_are_shared_out_evenly(accumulate: int, batch_size: int, count: int) -> None:
    shares: list[tuple[int, int]] = []
    for rank in range(count):
        ranks = Ranks(rank, count, torch.device("cpu"))
        index, parts = ranks.part(accumulate, batch_size)
        for micro in ranks.micro_batches(accumulate):
            size = batch_size // parts
            shares += [(micro, index * size + i) for i in range(size)]
    assert sorted(shares) == [(micro, i) for micro in range(accumulate) for i in range(batch_size)]


def test_samples_that_cannot_be_shared_out_are_explained() -> None:
    with pytest.raises(ValueError, match="4 processes cannot share a step of 1 x 6 samples .* a multiple of 4"):
        Ranks(0, 4, torch.device("cpu")).part(1, 6)


def test_one_process_talks_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with parallel.process_group() as ranks:
        assert (ranks.rank, ranks.count, ranks.first) == (0, 1, True)
        assert ranks.gather("word") == ["word"] and ranks.first_then_others(lambda: 3) == 3
        assert not torch.distributed.is_initialized()
        with pytest.raises(ValueError, match="mistake"):
            ranks.first_only(lambda: (_ for _ in ()).throw(ValueError("mistake")).__next__())


@pytest.mark.skipif(os.name == "nt", reason="a process's Ctrl-C is sent as SIGINT")
def test_a_run_under_torchrun_is_interrupted_and_one_process_ends_it(tmp_path: Path) -> None:
    """Ctrl-C saves; the rest, done by one process, gives what an undisturbed process gives."""
    torch.manual_seed(0)
    save(LatentModel(test_run.SOURCE).state_dict(), tmp_path / "source.safetensors")
    recipe, folder = tmp_path / "recipe.toml", RunFolder(tmp_path / "run")
    recipe.write_text(test_run.RECIPE.format(steps=100_000, lr=1e-3), encoding="utf-8")
    command = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    process = subprocess.Popen(
        [sys.executable, "-m", *command, "-m", "comfyui_l2p.train", "train", str(recipe), "--output", str(folder.path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not folder.state.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=900)
    assert "l2p: stopped." in said and said.count("l2p:") == 1, said
    done = len(read_metrics(folder.metrics))
    steps = 2 * (done // 2 + 1)
    recipe.write_text(test_run.RECIPE.format(steps=steps, lr=1e-3), encoding="utf-8")
    train(str(recipe), folder.path)
    train(str(recipe), tmp_path / "alone")
    assert [line["step"] for line in read_metrics(folder.metrics)] == list(range(1, steps + 1))
    alone = load_tensors(tmp_path / "alone" / "state.safetensors")[0]
    assert error(alone, folder.state) < 1e-4
