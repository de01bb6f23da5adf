"""`l2p synth` and `l2p evaluate` with running hosts: stopped, going on, and one of them killed at work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import graphs
import pytest
from host_server import Host, Server

from comfyui_l2p.l2p_core.dataset import readers
from comfyui_l2p.l2p_core.tiny.shapes import all_captions
from comfyui_l2p.train.fleet import IN_FLIGHT

PROMPTS, SEEDS = all_captions()[:10], 2


@pytest.fixture(scope="module")
def other(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(host, tmp_path_factory.mktemp("other")) as running:
        yield running


def workflow(path: Path) -> Path:
    """Text to image with stock nodes and the tiny source, as a user would export it."""
    nodes: dict[str, Any] = {
        "1": {"class_type": "L2PDemoSource", "inputs": {}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "{prompt}"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {"class_type": "PrimitiveInt", "inputs": {"value": 0}},
        "6": {
            "class_type": "KSampler",
            "inputs": {
                **graphs.ksampler(4)["6"]["inputs"],
                **{"model": ["1", 0], "latent_image": ["4", 0], "seed": ["5", 0]},
            },
        },
        "7": {"class_type": "VAEDecode", "inputs": {"vae": ["1", 2], "samples": ["6", 0]}},
        "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "synth"}},
    }
    path.write_text(json.dumps(nodes), encoding="utf-8")
    return path


def start(folder: Path, *servers: Server) -> subprocess.Popen[str]:
    prompts = folder.with_name("prompts.txt")
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    command = ("synth", workflow(folder.with_name("w.json")), folder, "--prompts", prompts, "--seeds", SEEDS)
    return begin(command, *servers)


def begin(command: Sequence[object], *servers: Server) -> subprocess.Popen[str]:
    hosts = [word for server in servers for word in ("--host", f"127.0.0.1:{server.port}")]
    return subprocess.Popen(
        [sys.executable, "-m", "comfyui_l2p.train", *map(str, command), *hosts, "--patience", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not reached():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_a_benchmarks_images_are_shared_and_resumed(server: Server, other: Server, tmp_path: Path) -> None:
    prompts, folder, single = tmp_path / "prompts", tmp_path / "dpg", tmp_path / "dpg-run" / "single"
    prompts.mkdir()
    for number, prompt in enumerate(PROMPTS[:3]):
        (prompts / f"partiprompts{number}.txt").write_text(prompt, encoding="utf-8")
    command = ("evaluate", "dpg", prompts, folder, "--workflow", workflow(tmp_path / "w.json"))
    process = begin(command, server, other)
    wait_until(lambda: any(single.glob("*.png")) or any(folder.glob("*.png")), process)
    if os.name == "posix":
        process.send_signal(signal.SIGINT)
    else:
        process.kill()
    process.communicate(timeout=120)
    assert process.returncode == 130 or os.name != "posix"
    assert len(images(folder)) < 3
    process = begin(command, server, other)
    output, error = process.communicate(timeout=400)
    assert process.returncode == 0, error
    assert "12 images" in output and "12 of them made now" not in output
    assert sorted(images(folder)) == [f"partiprompts{number}.png" for number in range(3)] and not images(single)
    assert all(any((host.base / "temp").glob("*.png")) for host in (server, other)), "both have worked"


def test_work_is_stopped_shared_and_survives_a_killed_host(server: Server, other: Server, tmp_path: Path) -> None:
    folder, history = tmp_path / "set", set(server.get("/history"))
    process = start(folder, server)
    wait_until(lambda: len(images(folder)) >= 3, process)
    if os.name == "posix":
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
        assert process.returncode == 130 and error.splitlines()[-1] == "l2p: stopped."
        assert not server.get("/queue")["queue_pending"]
    else:
        # Windows has no Ctrl-C for a single process; of one that is killed, the work in the queue is done in vain.
        process.kill()
        process.communicate()
        while any(server.get("/queue").values()):
            time.sleep(0.2)
    first = images(folder)
    assert 3 <= len(first) < len(PROMPTS) * SEEDS and not readers.read(folder).problems

    process = start(folder, server, other)
    before = len(list((other.base / "temp").glob("*.png")))
    wait_until(lambda: len(list((other.base / "temp").glob("*.png"))) > before, process)
    other.process.kill()
    output, error = process.communicate(timeout=400)
    assert process.returncode == 0, error
    assert f"127.0.0.1:{other.port} does not answer" in error
    assert f"20 images, {20 - len(first)} of them made now" in output
    listing = readers.read(folder)
    assert not listing.problems and len(listing.samples) == len({sample.seed for sample in listing.samples}) == 20
    assert first.items() <= images(folder).items()
    # Nothing was put into the host's output, and its history holds at most what was under way as work was taken back.
    assert not list((server.base / "output").glob("synth*"))
    new = {id: entry for id, entry in server.get("/history").items() if id not in history}
    assert len(new) <= (IN_FLIGHT if os.name == "posix" else 2 * IN_FLIGHT)
