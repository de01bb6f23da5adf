"""The pack in a host that computes on a device with memory of its own, and little of it: on a simulated one, see
`tests/accelerator/simulated.py`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import data_folders
import graphs
import numpy as np
import pytest
import torch
from host_server import Host, Run, Server
from safetensors.torch import save_file
from test_server import picture, sentence
from torch import Tensor

from comfyui_l2p.l2p_core import tiny
from comfyui_l2p.l2p_core.run.folder import RunFolder

SIMULATED = Path(__file__).resolve().parents[1] / "accelerator"
sys.path.insert(0, str(SIMULATED))

import simulated  # noqa: E402

pytestmark = pytest.mark.skipif(simulated.why_not() is not None, reason=str(simulated.why_not()))

MIB = 2**20
LORA, DELTA = "adapters.safetensors", "bundled.safetensors"
HOSTS_RESERVE = 1219 * MIB
"""What the host keeps free for others and for computing, whatever the model."""


def on_it(host: Host, base: Path, room: int, flag: str, *flags: str, paths: tuple[Path, ...] = ()) -> Server:
    """A host whose device has room for this many bytes of weights beside the host's reserve."""
    data_folders.tiny_set(base / "datasets" / "shapes", 6)
    for folder in ("loras", "diffusion_models"):
        (base / "models" / folder).mkdir(parents=True)
    save_file(adapters(), base / "models" / "loras" / LORA)
    shutil.copy(tiny.DELTA_PATH, base / "models" / "diffusion_models" / DELTA)
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, (*paths, SIMULATED))),
        "SIMULATED_ACCELERATOR_BYTES": str(HOSTS_RESERVE + room),
        "SIMULATED_AIMDO_KEPT_FREE": str(HOSTS_RESERVE),
    }
    # A CPU computes float32 faster than the bfloat16 that the host would take there.
    return Server(host, base, "--fp32-unet", *flags, device=flag, **environment)


def adapters() -> dict[str, Tensor]:
    """A LoRA that changes the bundled model's images."""
    torch.manual_seed(0)
    width = tiny.load_source().config.dim
    name = "diffusion_model.layers.{}.attention.out.{}.weight"
    up = {name.format(layer, "lora_up"): torch.randn(width, 2) for layer in range(4)}
    return up | {name.format(layer, "lora_down"): 0.5 * torch.randn(2, width) for layer in range(4)}


@pytest.fixture(scope="module")
def small(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """--lowvram on a device with room for half of the bundled model."""
    with on_it(host, tmp_path_factory.mktemp("lowvram"), 4 * MIB, "--lowvram") as running:
        yield running


@pytest.fixture(scope="module")
def none(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """--novram: no weight stays on the device."""
    with on_it(host, tmp_path_factory.mktemp("novram"), 500 * MIB, "--novram") as running:
        yield running


@pytest.fixture(scope="module")
def dynamic(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Dynamic VRAM, the host's own choice for NVIDIA's GPUs, with room for half of the bundled model."""
    if '"--enable-dynamic-vram"' not in (host.path / "comfy" / "cli_args.py").read_text(encoding="utf-8"):
        pytest.skip("this host has no dynamic VRAM that can be asked for")
    # Only CUDA can pin and copy beside the computation as the host wants it.
    flags = ("--enable-dynamic-vram", "--disable-pinned-memory", "--disable-async-offload")
    base = tmp_path_factory.mktemp("dynamic")
    with on_it(host, base, 4 * MIB, *flags, paths=(SIMULATED / "dynamic_vram",)) as running:
        yield running


def pictures(server: Server) -> tuple[np.ndarray, np.ndarray]:
    """Pixel Sampler's image and KSampler's, of values 0 to 255."""
    sampled, ours = run_whole(server, graphs.demo(steps=4)), run_whole(server, graphs.ksampler(4))
    return picture(server, sampled, "5").astype(int), picture(server, ours, "8").astype(int)


def run_whole(server: Server, graph: graphs.Json) -> Run:
    """Run a workflow that must come to its end."""
    run = server.run(graph)
    assert run.error is None, run.error["exception_message"]
    return run


def test_little_memory_gives_the_same_images(small: Server, none: Server, server: Server) -> None:
    assert small.get("/system_stats")["devices"][0]["type"] == simulated.NAME
    partly, streamed, whole = pictures(small), pictures(none), pictures(server)
    assert "loaded partially" in small.log_text() and "loaded partially; 0.00 MB usable" in none.log_text()
    for one, other, expected in zip(partly, streamed, whole, strict=True):
        assert np.abs(one - other).max() <= 2
        assert np.abs(one - expected).max() <= 2


def with_lora() -> graphs.Json:
    """Pixel Sampler with the LoRA: node 5 saves."""
    inputs = {"model": ["1", 0], "lora_name": LORA, "strength_model": 1.0}
    return graphs.demo(steps=4, model=["6", 0]) | {"6": {"class_type": "LoraLoaderModelOnly", "inputs": inputs}}


def in_fp8() -> graphs.Json:
    """Pixel Sampler with the blocks in 8 bits: node 5 saves."""
    inputs = {"file": graphs.TINY, "delta": DELTA, "weight_dtype": "fp8_e4m3fn", "head_tile": "whole"}
    return graphs.demo(steps=4, model=["6", 0]) | {"6": {"class_type": "L2PLoader", "inputs": inputs}}


def test_dynamic_vram_gives_the_same_images(dynamic: Server, small: Server) -> None:
    plain = pictures(small)
    for one, other in zip(pictures(dynamic), plain, strict=True):
        assert np.abs(one - other).max() <= 2
    assert "prepared for dynamic VRAM loading" in dynamic.log_text()
    for graph in (with_lora(), in_fp8(), graphs.demo(steps=4, seed=1)):
        ours, theirs = (picture(server, run_whole(server, graph), "5").astype(int) for server in (dynamic, small))
        assert np.abs(ours - theirs).mean() < 2
    assert np.abs(picture(dynamic, run_whole(dynamic, with_lora()), "5") - plain[0]).mean() > 4


def hybrid_image(server: Server, dual: bool) -> np.ndarray:
    return picture(server, run_whole(server, graphs.hybrid(dual)), "6").astype(int)


@pytest.mark.parametrize("kind", ["small", "none", "dynamic"])
def test_two_models_on_one_set_of_weights_make_the_same_image(
    kind: str, request: pytest.FixtureRequest, server: Server
) -> None:
    there: Server = request.getfixturevalue(kind)
    alone, expected = hybrid_image(there, dual=False), hybrid_image(server, dual=False)
    for image in (alone, hybrid_image(there, dual=True), hybrid_image(server, dual=True)):
        assert np.abs(image - expected).max() <= 2


@pytest.mark.parametrize("kind", ["small", "dynamic"])
def test_training_there_gives_the_device_back(kind: str, request: pytest.FixtureRequest) -> None:
    server: Server = request.getfixturevalue(kind)
    run_whole(server, graphs.train("there"))
    folder = RunFolder(server.base / "output" / "l2p_runs" / "there")
    assert "GPU memory" in folder.plan.read_text("utf-8") and folder.delta.is_file()
    run_whole(server, graphs.demo(steps=2, seed=5))


def test_training_that_its_memory_does_not_hold_is_refused(small: Server) -> None:
    said = sentence(small.run(graphs.train("too large", batch_size=4096)))
    assert "GPU memory" in said and "It would fit with" in said
    run_whole(small, graphs.demo(steps=1, seed=6))


def test_data_is_made_there(small: Server) -> None:
    run_whole(small, graphs.synthesize(images_per_prompt=1, dataset="made"))
    assert len(list((small.base / "datasets" / "made").rglob("*.png"))) == 1
