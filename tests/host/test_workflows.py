"""The shared workflows fit the nodes as they are, and those that need no download run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
from host_server import Refused, Server
from PIL import Image
from test_server import picture

WORKFLOWS = sorted((Path(__file__).resolve().parents[2] / "example_workflows").glob("*.json"))
BLUEPRINTS = sorted((Path(__file__).resolve().parents[2] / "subgraphs").glob("*.json"))
EARLIER = sorted((Path(__file__).resolve().parents[1] / "fixtures").glob("*/workflows/*.json"))
"""As users of earlier versions have saved them."""
REFERENCE = Path(__file__).parent / "reference"
FRONTEND_ONLY = {"MarkdownNote"}
SMALL: dict[str, dict[str, Any]] = {
    "L2PSynthesizeDataset": {"images_per_prompt": 1, "steps": 2},
    "L2PPixelSampler": {"steps": 2},
    "L2PCompare": {"source_steps": 2, "pixel_steps": 2},
    "L2PTrain": {"steps": 2, "batch_size": 2, "changes": "[watch]\nsteps = 1"},
}
"""What would take minutes, in seconds."""


def read(path: Path) -> dict[str, Any]:
    workflow: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return workflow


@pytest.mark.parametrize("path", [*WORKFLOWS, *EARLIER], ids=lambda path: f"{path.parts[-3]} {path.stem}")
def test_a_workflow_fits_the_nodes(server: Server, path: Path) -> None:
    """All that the server may find wrong with it are files that are not there."""
    workflow = read(path)
    info = server.get("/object_info")
    assert {node["type"] for node in workflow["nodes"]} <= set(info) | FRONTEND_ONLY
    assert path in EARLIER or path.with_suffix(".jpg").is_file()
    # The server may refuse a file by the host's sentence or by ours; both name it.
    offered = {model["name"] for node in workflow["nodes"] for model in node["properties"].get("models", [])}
    prompt = graphs.from_workflow(workflow, info)
    for node in prompt.values():
        node["inputs"] |= SMALL.get(node["class_type"], {})
    try:
        run = server.run(prompt)
        assert run.error is None, run.error
    except Refused as refused:
        for node in refused.errors.values():
            for problem in node["errors"]:
                assert any(name in problem["details"] for name in offered | {"example.png"}), problem


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_linked_list_shows_no_choice_that_is_not_there(server: Server, path: Path) -> None:
    """Nodes 2.0 draws a red ring around it until the file has been made."""
    workflow, info = read(path), server.get("/object_info")
    prompt = graphs.from_workflow(workflow, info)
    shown = graphs.from_workflow(workflow | {"nodes": [node | {"inputs": []} for node in workflow["nodes"]]}, info)
    for key, node in prompt.items():
        for name, value in node["inputs"].items():
            kind, *settings = info[node["class_type"]]["input"]["required"].get(name, ["an optional input"])
            if isinstance(value, list) and (isinstance(kind, list) or kind == "COMBO"):
                options = kind if isinstance(kind, list) else settings[0]["options"]
                assert shown[key]["inputs"][name] in ("", *options)


BUNDLED: dict[str, Any] = {
    "L2PLoader": ["pixels", 0],
    "UNETLoader": ["source", 0],
    "CLIPLoader": ["source", 1],
    "VAELoader": ["source", 2],
    "LoadImage": ["canvas", 0],
}
"""What stands for the loaders of large models, and for the host's example picture."""


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("5 Text to image 1k", 64),
        ("14 Enlarge a picture to 4K", 96),
        ("15 Turbo layout, pixel finish", 64),
        ("16 Grow from 1k to 4k to 8k", 96),
    ],
)
def test_a_workflow_runs_with_the_bundled_model_in_its_place(server: Server, name: str, side: int) -> None:
    """What the real models' workflows do, their loaders and sizes aside."""
    (path,) = (path for path in WORKFLOWS if path.stem == name)
    prompt = graphs.from_workflow(read(path), server.get("/object_info"))
    loaders = {key: node["class_type"] for key, node in prompt.items() if node["class_type"] in BUNDLED}
    growing = iter((80, 96))
    for node in prompt.values():
        inputs = node["inputs"]
        for key, value in inputs.items():
            if isinstance(value, list) and value[0] in loaders:
                inputs[key] = BUNDLED[loaders[value[0]]]
        if inputs.get("text"):
            inputs["text"] = graphs.CAPTION
        if "steps" in inputs:
            inputs["steps"] = 2
        if node["class_type"] == "L2PGrowPixels":
            inputs["width"] = inputs["height"] = next(growing)
        if inputs.get("task") == "upscale":
            inputs["width"] = inputs["height"] = 96
    canvas = {"width": 64, "height": 64, "batch_size": 1, "color": 255}
    prompt = {key: node for key, node in prompt.items() if key not in loaders} | {
        "pixels": {"class_type": "L2PDemo", "inputs": {}},
        "source": {"class_type": "L2PDemoSource", "inputs": {}},
        "canvas": {"class_type": "EmptyImage", "inputs": canvas},
    }
    (save,) = (key for key, node in prompt.items() if node["class_type"] == "SaveImage")
    assert picture(server, server.run(prompt), save).shape == (side, side, 3)


def test_inpainting_keeps_what_is_outside_the_mask(server: Server) -> None:
    (path,) = (path for path in WORKFLOWS if path.stem == "3 Inpainting in pixels")
    prompt = graphs.from_workflow(read(path), server.get("/object_info"))
    for node in prompt.values():
        if node["class_type"] == "L2PPixelSampler":
            node["inputs"]["steps"] = 2
    run = server.run(prompt)
    kinds = {node["class_type"]: key for key, node in prompt.items()}
    before, after = (picture(server, run, kinds[kind]) for kind in ("PreviewImage", "SaveImage"))
    painted = np.zeros((64, 64), bool)
    painted[12:52, 12:52] = True
    # Much of both is pure white.
    assert (before[~painted] == after[~painted]).all() and (before[painted] != after[painted]).any(-1).mean() > 0.5


def test_the_demo_workflow_matches_its_reference(server: Server) -> None:
    """Sampling is float32 with a seeded noise; other hosts and processors round a little differently."""
    workflow = read(next(path for path in WORKFLOWS if path.stem == "1 L2P demo"))
    (save,) = (str(node["id"]) for node in workflow["nodes"] if node["type"] == "SaveImage")
    run = server.run(graphs.from_workflow(workflow, server.get("/object_info")))
    result = picture(server, run, save).astype(int)
    reference = np.asarray(Image.open(REFERENCE / "l2p_demo.png").convert("RGB")).astype(int)
    assert result.shape == reference.shape
    assert np.abs(result - reference).mean() < 1.0 and np.abs(result - reference).max() < 16


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_a_blueprint_runs_with_the_bundled_model(server: Server, path: Path) -> None:
    """Its loaders aside, which want large models."""
    (subgraph,) = read(path)["definitions"]["subgraphs"]
    given = {"MODEL": ["demo", 0], "CLIP": ["demo", 1], "IMAGE": ["canvas", 0]}
    prompt, output = graphs.from_blueprint(subgraph, server.get("/object_info"), given)
    loaders = {key: node["class_type"] for key, node in prompt.items() if node["class_type"].endswith("Loader")}
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in loaders:
                node["inputs"][name] = given[{"L2PLoader": "MODEL", "CLIPLoader": "CLIP"}[loaders[value[0]]]]
        if node["class_type"] == "CLIPTextEncode":
            node["inputs"]["text"] = graphs.CAPTION
        node["inputs"] |= SMALL.get(node["class_type"], {})
    prompt = {key: node for key, node in prompt.items() if key not in loaders}
    canvas = {"width": 64, "height": 64, "batch_size": 1, "color": 255}
    prompt["demo"] = {"class_type": "L2PDemo", "inputs": {}}
    prompt["canvas"] = {"class_type": "EmptyImage", "inputs": canvas}
    prompt["save"] = {"class_type": "SaveImage", "inputs": {"images": output, "filename_prefix": "blueprint"}}
    assert picture(server, server.run(prompt), "save").shape == (64, 64, 3)
