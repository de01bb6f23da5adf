"""The pack in a host that computes on a device with memory of its own, and little of it: on a simulated one, see
`tests/accelerator/simulated.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import data_folders
import graphs
import numpy as np
import pytest
from host_server import Host, Server
from test_server import picture, sentence

from comfyui_l2p.l2p_core.run.folder import RunFolder

SIMULATED = Path(__file__).resolve().parents[1] / "accelerator"
sys.path.insert(0, str(SIMULATED))

import simulated  # noqa: E402

pytestmark = pytest.mark.skipif(simulated.why_not() is not None, reason=str(simulated.why_not()))

MIB = 2**20
HOSTS_RESERVE = 1219 * MIB
"""What the host keeps free for others and for computing, whatever the model."""


def on_it(host: Host, base: Path, flag: str, room: int) -> Server:
    """A host whose device has room for this many bytes of weights beside the host's reserve."""
    size = str(HOSTS_RESERVE + room)
    return Server(host, base, device=flag, PYTHONPATH=str(SIMULATED), SIMULATED_ACCELERATOR_BYTES=size)


@pytest.fixture(scope="module")
def small(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """--lowvram on a device with room for half of the bundled model."""
    base = tmp_path_factory.mktemp("lowvram")
    data_folders.tiny_set(base / "datasets" / "shapes", 6)
    with on_it(host, base, "--lowvram", 4 * MIB) as running:
        yield running


@pytest.fixture(scope="module")
def none(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """--novram: no weight stays on the device."""
    with on_it(host, tmp_path_factory.mktemp("novram"), "--novram", 500 * MIB) as running:
        yield running


def pictures(server: Server) -> tuple[np.ndarray, np.ndarray]:
    """Pixel Sampler's image and KSampler's, of values 0 to 255."""
    sampled, ours = server.run(graphs.demo(steps=4)), server.run(graphs.ksampler(4))
    assert sampled.error is None and ours.error is None, (sampled.error, ours.error)
    return picture(server, sampled, "5").astype(int), picture(server, ours, "8").astype(int)


def test_little_memory_gives_the_same_images(small: Server, none: Server, server: Server) -> None:
    assert small.get("/system_stats")["devices"][0]["type"] == simulated.NAME
    partly, streamed, whole = pictures(small), pictures(none), pictures(server)
    assert "loaded partially" in small.log_text() and "loaded partially; 0.00 MB usable" in none.log_text()
    for one, other, expected in zip(partly, streamed, whole, strict=True):
        assert np.abs(one - other).max() <= 2
        # The host computes in bfloat16 there, and in float32 on the CPU.
        assert np.abs(one - expected).mean() < 4


def test_training_there_gives_the_device_back(small: Server) -> None:
    graph = graphs.train("there", memory="as the recipe")
    run = small.run(graph)
    assert run.error is None, run.error
    folder = RunFolder(small.base / "output" / "l2p_runs" / "there")
    assert "GPU memory" in folder.plan.read_text("utf-8") and folder.delta.is_file()
    assert small.run(graphs.demo(steps=2, seed=5)).error is None


def test_training_that_its_memory_does_not_hold_is_refused(small: Server) -> None:
    said = sentence(small.run(graphs.train("too large", batch_size=4096)))
    assert "GPU memory" in said and "It would fit with" in said
    assert small.run(graphs.demo(steps=1, seed=6)).error is None


def test_data_is_made_there(small: Server) -> None:
    run = small.run(graphs.synthesize(images_per_prompt=1, dataset="made"))
    assert run.error is None, run.error
    assert len(list((small.base / "datasets" / "made").rglob("*.png"))) == 1
