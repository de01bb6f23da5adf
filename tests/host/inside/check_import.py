"""What importing the pack costs the host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from comfyui_l2p.l2p_core import config, freeze
from comfyui_l2p.l2p_core.dataset import formats, prompts
from comfyui_l2p.l2p_core.deep_images import reading
from comfyui_l2p.l2p_core.files import metadata
from comfyui_l2p.nodes import options
from comfyui_l2p.nodes.folders import kinds

SCRIPT = """
import asyncio, importlib.util, sys
sys.path.insert(0, sys.argv[1])
import utils.extra_config  # These are what main.py imports before it loads custom nodes.
from comfy.cli_args import args
args.cpu = True
import server, nodes, latent_preview, comfy_api.latest
import comfy_extras.nodes_custom_sampler
before = set(sys.modules)
root = sys.argv[2]
spec = importlib.util.spec_from_file_location("pack", root + "/__init__.py", submodule_search_locations=[root])
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
spec.loader.exec_module(pack)
async def load():
    extension = await pack.comfy_entrypoint()
    await extension.on_load()
    for node in await extension.get_node_list():
        node.GET_SCHEMA()
asyncio.run(load())
new = set(sys.modules) - before
print("OWN", *sorted(name.removeprefix("pack.") for name in new if name.startswith("pack.")))
print("OTHER", *sorted({name.partition(".")[0] for name in new} - {"pack"} - set(sys.stdlib_module_names)))
"""

WITH_THE_HOST = {
    "l2p_core",
    "l2p_core.files",
    "l2p_core.files.paths",
    "l2p_core.files.safetensors_header",
    "l2p_core.files.shards",
    "l2p_core.run",
    "l2p_core.run.find",
    "l2p_core.version",
}
"""What the nodes' schemas need of the core: names of files and recipes. No model, no training, no images."""

WHEN_A_NODE_RUNS = {
    f"nodes.{name}"
    for name in (
        *("captions", "pixels", "sampling", "synthesis", "training"),
        *("folders.run_files", "messages.doctor", "messages.jobs", "messages.live", "messages.refused"),
        *("model.content", "model.demo", "model.demo_source", "model.host", "model.limits", "model.loading"),
        *("model.lora", "model.lora_names", "model.network", "model.patcher", "model.quantised", "model.weights"),
    )
}


@pytest.fixture(scope="module")
def imported() -> dict[str, set[str]]:
    """The modules that a host's start with the pack imports on top of its own: ours, and others."""
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, os.environ["COMFYUI_PATH"], str(root)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    found = {kind: set(names) for kind, *names in filter(None, lines) if kind in ("OWN", "OTHER")}
    assert len(found) == 2, done.stderr[-2000:]
    return found


def check_importing_brings_no_module_the_host_has_not_loaded(imported: dict[str, set[str]]) -> None:
    assert imported["OTHER"] == set()


def check_what_does_the_work_waits_until_a_node_runs(imported: dict[str, set[str]]) -> None:
    """Deterministic, in place of a time: the whole core took 0.2 s of the host's start."""
    own = imported["OWN"]
    assert {name for name in own if name.startswith("l2p_core")} == WITH_THE_HOST
    assert not own & WHEN_A_NODE_RUNS


def check_choices_are_those_of_the_core() -> None:
    """Written out in `options`, so that schemas need no import of the core."""
    assert tuple(config.VARIANTS) == options.VARIANTS
    assert freeze.POLICIES == options.POLICIES
    assert prompts.SUFFIXES == options.PROMPT_SUFFIXES
    deep = {"PNG", "TIFF", *reading.PACKAGES}
    assert {suffix for suffix, name in formats.SUFFIXES.items() if name in deep} - {".apng"} == {*options.DEEP_SUFFIXES}
    assert (kinds._KIND_KEY, kinds.DELTA, kinds.INITIAL) == (metadata.KIND, metadata.DELTA, metadata.PIXEL_INIT)
