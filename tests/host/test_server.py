"""The pack on a running server, as a user's machine would use it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import data_folders
import golden_vectors as golden
import graphs
import numpy as np
import pytest
import torch
from host_server import Refused, Run, Server
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_checkpoints import write_shards

from comfyui_l2p.l2p_core import delta, tiny
from comfyui_l2p.l2p_core.checkpoint import load_tensors, open_checkpoint
from comfyui_l2p.l2p_core.config import COMFY_PREFIX
from comfyui_l2p.l2p_core.files.metadata import DELTA, KIND
from comfyui_l2p.l2p_core.layouts import to_comfy

NODES = {
    "L2PLoader",
    "L2PPixelSampler",
    "L2PEmptyPixels",
    "L2PImageToPixels",
    "L2PPixelsToImage",
    "L2PHybridSampler",
    "L2PDualLoader",
    "L2PLatentToPixels",
    "L2PPixelsToLatent",
    "L2PGrowPixels",
    "L2PPartSigmas",
    "L2PLoadDeepImage",
    "L2PSaveTIFF",
    "L2PConvert",
    "L2PSaveDelta",
    "L2PMergeDelta",
    "L2PPrompts",
    "L2PSaveQuantised",
    "L2PSynthesizeDataset",
    "L2PTrain",
    "L2PCompare",
    "L2PEvaluate",
    "L2PDemo",
    "L2PDemoSource",
}


DELTA_OFFERED = [
    ("L2PLoader", "delta", True),
    ("L2PMergeDelta", "delta", True),
    ("L2PLoader", "file", False),
    ("L2PConvert", "source", False),
    ("L2PTrain", "model", False),
    ("L2PSaveDelta", "trained", False),
    ("L2PSaveDelta", "base", False),
    ("L2PMergeDelta", "base", False),
]
"""Where a delta suits an input; elsewhere whole files do."""


def options_of(server: Server, node: str, input: str) -> list[str]:
    """What the frontend offers in a list."""
    kind, *settings = server.get(f"/object_info/{node}")[node]["input"]["required"][input]
    options: list[str] = settings[0]["options"] if isinstance(kind, str) else kind
    return options


def picture(server: Server, run: Run, node: str) -> np.ndarray[Any, Any]:
    """The image that a SaveImage node wrote, fetched as a browser would."""
    assert run.error is None, run.error
    saved = run.outputs[node]["images"][0]
    body = server.get(f"/view?filename={saved['filename']}&subfolder={saved['subfolder']}&type={saved['type']}")
    return np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))


def sentence(run: Run) -> str:
    """What the user reads at the node that failed."""
    assert run.error is not None
    text: str = run.error["exception_message"]
    return text


@pytest.fixture
def models(server: Server) -> Path:
    return server.base / "models" / "diffusion_models"


def test_what_a_bug_report_needs_is_at_an_address(server: Server) -> None:
    text = server.get("/l2p/doctor").decode()
    version = server.get("/system_stats")["system"]["comfyui_version"]
    assert f"host:\n  ComfyUI: {version}\n" in text and "  options: --" in text and "  RAM: " in text
    assert f"--port {server.port}" in text and "--base-directory" in text, "options are named"
    assert "--fast" not in text and "--cuda-malloc" not in text, "which the host sets itself"
    assert str(server.base) not in text and str(Path.home()) not in text


def test_nodes_are_there_and_nothing_was_warned_of(server: Server) -> None:
    assert set(server.get("/object_info")) >= NODES
    starting, _, _ = server.log_text().partition("Starting server")
    own_lines = [line for line in starting.splitlines() if "ComfyUI-L2P" in line]
    assert len(own_lines) == 1 and "IMPORT FAILED" not in own_lines[0]


def test_every_input_and_node_explains_itself(server: Server) -> None:
    shown = server.get("/i18n")["en"]["nodeDefs"]
    for node in NODES:
        info, english = server.get(f"/object_info/{node}")[node], shown[node]
        assert info["category"].startswith("L2P") and info["description"]
        assert any("\u4e00" <= letter <= "\u9fff" for alias in info["search_aliases"] for letter in alias), node
        for kind in ("required", "optional"):
            for name, (_, *settings) in info["input"].get(kind, {}).items():
                assert settings and settings[0].get("tooltip"), f"{node}.{name} has no tooltip"
                assert english["inputs"][name]["tooltip"] == settings[0]["tooltip"], f"what the frontend shows, {name}"
        tooltips = info["output_tooltips"] or []
        assert len(tooltips) == len(info["output"]) and all(tooltips), f"an output of {node} has no tooltip"
        assert [output["tooltip"] for output in english.get("outputs", {}).values()] == tooltips
        assert server.get(f"/extensions/ComfyUI-L2P/docs/{node}.md").startswith(b"# ")


def test_sizes_are_free_and_writers_keep_their_seed(server: Server) -> None:
    """What frontends read of it: no steps of 16 in a size, no new seed behind a file that is there already."""
    for node in NODES:
        info = server.get(f"/object_info/{node}")[node]
        assert not info.get("essentials_category"), "it would stand apart from the pack's other nodes"
        inputs = {
            name: spec for kind in info["input"].values() if isinstance(kind, dict) for name, spec in kind.items()
        }
        for side in inputs.keys() & {"width", "height"}:
            assert inputs[side][1].get("step", 1) == 1
        if info["output_node"] and "seed" in inputs:
            assert inputs["seed"][1]["control_after_generate"] is False
    sampler = server.get("/object_info/L2PPixelSampler")["L2PPixelSampler"]["input"]
    assert [sampler["required"][side][1]["default"] for side in ("width", "height")] == [0, 0]


@pytest.mark.parametrize(
    ("inputs", "shape"),
    [
        ({"width": 0, "height": 0}, (64, 64, 3)),
        ({"width": 0, "height": 37}, (37, 64, 3)),
        ({"width": 50, "height": 0, "aspect": "16:9 landscape"}, (48, 80, 3)),
    ],
)
def test_a_model_knows_its_size(server: Server, inputs: dict[str, Any], shape: tuple[int, ...]) -> None:
    run = server.run(graphs.demo(steps=1, **inputs))
    assert picture(server, run, "5").shape == shape
    blank = graphs.ksampler(steps=1)
    blank["4"]["inputs"] |= {"model": ["1", 0], **inputs}
    assert picture(server, server.run(blank), "8").shape == shape


def test_a_side_of_a_few_pixels_is_refused(server: Server) -> None:
    assert "The width is 7: use 16 pixels or more, or 0" in sentence(server.run(graphs.demo(width=7)))


def test_the_demo_makes_an_image_with_previews_and_progress(server: Server) -> None:
    run = server.run(graphs.demo())
    assert picture(server, run, "5").shape == (64, 64, 3)
    assert run.progress[-1] == ("4", 30, 30) and len(run.previews) >= 10
    # The frontend writes a preview's size below it.
    assert {Image.open(io.BytesIO(preview[8:])).size for preview in run.previews} == {(64, 64)}


def test_ksampler_and_pixel_sampler_make_the_same_image(server: Server) -> None:
    ours = server.run(graphs.demo(steps=4, cfg=2.0, scheduler="simple"))
    theirs = server.run(graphs.ksampler(steps=4))
    assert np.array_equal(picture(server, ours, "5"), picture(server, theirs, "8"))


def test_an_interrupted_workflow_runs_again(server: Server) -> None:
    run = server.run(
        graphs.demo(steps=2000), interrupt_when=lambda run: bool(run.progress) and run.progress[-1][1] >= 3
    )
    assert run.interrupted and run.progress[-1][1] < 2000
    assert picture(server, server.run(graphs.demo(steps=3)), "5").shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"steps": 0}, "steps is 0: use 1 or more"),
        ({"denoise": 0.0}, "smaller than min"),
        ({"sampler_name": "no such sampler"}, "not in list"),
    ],
)
def test_wrong_settings_are_refused_at_once(server: Server, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(Refused) as refused:
        server.run(graphs.demo(**changes))
    assert expected in refused.value.sentences()
    assert len(refused.value.errors["4"]["errors"]) == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"width": 16384, "height": 16384, "batch_size": 64}, "choose a smaller size or batch"),
        ({"cfg": -3.0}, "smaller than min"),
        ({"denoise": 0.5}, "which needs an image to start from"),
    ],
)
def test_wrong_settings_end_in_a_sentence(server: Server, changes: dict[str, Any], expected: str) -> None:
    try:
        text = sentence(server.run(graphs.demo(**changes)))
    except Refused as refused:
        text = refused.sentences()
    assert expected in text
    assert picture(server, server.run(graphs.demo(steps=2, seed=7)), "5").any()


def test_a_canvas_that_no_memory_holds_is_refused(server: Server) -> None:
    graph = graphs.ksampler()
    graph["4"]["inputs"] |= {"width": 16384, "height": 16384, "batch_size": 4096}
    assert "GiB of RAM, but" in sentence(server.run(graph))
    assert picture(server, server.run(graphs.ksampler(steps=1)), "8").shape == (64, 64, 3)


def test_a_mask_of_another_size_is_named(server: Server) -> None:
    graph = graphs.demo(image=["6", 0], mask=["7", 0])
    graph["6"] = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}}
    graph["7"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 32, "height": 48}}
    assert "The mask is 32x48, but the image is 64x64" in sentence(server.run(graph))


@pytest.mark.parametrize(("mode", "size"), [("RGB", (80, 48)), ("RGB", (64, 64)), ("RGBA", (80, 48))])
def test_a_mask_that_nobody_has_painted_is_named(server: Server, mode: str, size: tuple[int, int]) -> None:
    """Load Image gives 64 x 64 zeros for an image without alpha, and zeros of the image's size for an opaque one."""
    Image.new(mode, size, (9, 9, 9, 255)[: len(mode)]).save(server.base / "input" / "unpainted.png")
    graph = graphs.demo(image=["6", 0], mask=["6", 1])
    graph["6"] = {"class_type": "LoadImage", "inputs": {"image": "unpainted.png"}}
    assert "Open in Mask Editor" in sentence(server.run(graph))


def test_inpainting_leaves_unmasked_pixels_alone(server: Server) -> None:
    colour = 0x3264C8
    graph = graphs.demo(image=["6", 0], mask=["9", 0], steps=4)
    graph["6"] = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": colour}}
    graph["7"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 64, "height": 64}}
    graph["8"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 20, "height": 20}}
    add = {"destination": ["7", 0], "source": ["8", 0], "x": 13, "y": 7, "operation": "add"}
    graph["9"] = {"class_type": "MaskComposite", "inputs": add}
    result = picture(server, server.run(graph), "5")
    painted = np.zeros((64, 64), bool)
    painted[7:27, 13:33] = True
    assert (result[~painted] == (0x32, 0x64, 0xC8)).all()
    assert (result[painted] != (0x32, 0x64, 0xC8)).any(-1).mean() > 0.9


def test_files_that_are_not_there_or_not_l2p(server: Server, models: Path) -> None:
    with pytest.raises(Refused) as refused:
        server.run(graphs.loader("missing.safetensors"))
    assert "There is no file 'missing.safetensors'" in refused.value.sentences()
    (models / "broken.safetensors").write_bytes(b"no model")
    shutil.copy(tiny.SOURCE_PATH, models / "latent.safetensors")
    broken = server.run(graphs.loader("broken.safetensors"))
    assert str(server.base) not in sentence(broken) and "broken.safetensors" in sentence(broken)
    assert broken.error is not None and broken.error["exception_type"] == "ValueError"
    assert "use L2P Demo" in sentence(server.run(graphs.loader(graphs.TINY)))
    assert "Convert to L2P" in sentence(server.run(graphs.loader("latent.safetensors")))


def test_convert_load_and_refuse_to_overwrite(server: Server, models: Path) -> None:
    shutil.copy(tiny.SOURCE_PATH, models / "source.safetensors")
    run = server.run(graphs.convert("source.safetensors", "folder/made"))
    assert run.error is None, run.error
    assert (models / "folder" / "made.safetensors").is_file()
    assert "initialised" in run.outputs["3"]["text"][0]
    again = server.run(graphs.convert("source.safetensors", "folder/made", variant="4k"))
    assert "already exists" in sentence(again)
    assert server.run(graphs.convert("source.safetensors", "folder/made", overwrite=True, variant="4k")).error is None
    for name in ("../outside", "/outside", ""):
        with pytest.raises(Refused) as refused:
            server.run(graphs.convert("source.safetensors", name))
        assert "file name" in refused.value.sentences()
    assert {path.name for path in models.rglob("*made*")} == {"made.safetensors"}


def test_delta_saved_loaded_and_merged(server: Server, models: Path) -> None:
    weights = golden.diffusers_weights()
    save_file(weights, models / "base.safetensors")
    weights["local_decoder.out_conv.bias"] += 1
    save_file(weights, models / "trained.safetensors")
    save_file(golden.diffusers_weights(seed=9), models / "other.safetensors")
    names = {"base": "base.safetensors", "overwrite": True}
    save = {"trained": "trained.safetensors", "filename": "change", **names}
    run = server.run({"1": {"class_type": "L2PSaveDelta", "inputs": save}})
    assert run.error is None, run.error
    assert (models / "change.safetensors").stat().st_size < (models / "trained.safetensors").stat().st_size / 2
    assert "change.md: the model card" in run.outputs["1"]["text"][0]
    assert "1 trained tensors here" in (models / "change.md").read_text(encoding="utf-8")
    first = {
        name: spec[1]["default"]
        for name, spec in server.get("/object_info/L2PMergeDelta")["L2PMergeDelta"]["input"]["required"].items()
    }
    assert open_checkpoint(models / first["delta"]).is_delta, "what is chosen at first is of the kind that is asked for"
    for node, input, is_offered in DELTA_OFFERED:
        offered = options_of(server, node, input)
        assert ("change.safetensors" in offered) == is_offered and ("base.safetensors" in offered) != is_offered
    for node, inputs in {"L2PMergeDelta": ("delta",), "L2PSaveDelta": ("trained", "base")}.items():
        chosen = {"delta": "change.safetensors", "trained": "trained.safetensors", **names, "filename": "none_chosen"}
        for name in inputs:
            graph = {"1": {"class_type": node, "inputs": {**chosen, name: "none"}}}
            assert "is chosen: choose one in the list" in sentence(server.run(graph))
    assert server.run(graphs.loader("base.safetensors", "change.safetensors")).error is None
    merge = {"delta": "change.safetensors", "filename": "merged", **names}
    assert server.run({"1": {"class_type": "L2PMergeDelta", "inputs": merge}}).error is None
    assert "was made for another base" in sentence(server.run(graphs.loader("other.safetensors", "change.safetensors")))


def test_a_changed_file_is_loaded_again(server: Server, models: Path) -> None:
    path = models / "changing.safetensors"
    save_file(golden.diffusers_weights(), path)
    first = server.run(graphs.loader(path.name))
    assert "1" not in server.run(graphs.loader(path.name)).ran and "1" in first.ran
    save_file(golden.diffusers_weights(seed=9), path)
    assert "1" in server.run(graphs.loader(path.name)).ran


def test_a_node_runs_again_where_its_own_file_is_not_as_it_left_it(server: Server, models: Path) -> None:
    """And not because the file is there now; where it may not replace a stranger's, it says so and does not succeed."""
    weights = golden.diffusers_weights()
    save_file(weights, models / "own_base.safetensors")
    weights["local_decoder.out_conv.bias"] += 1
    save_file(weights, models / "own_trained.safetensors")
    shutil.copy(tiny.SOURCE_PATH, models / "own_source.safetensors")
    save = {"trained": "own_trained.safetensors", "base": "own_base.safetensors", "filename": "own_delta"}
    merge = {"delta": ["1", 0], "base": "own_base.safetensors", "filename": "own_merged", "overwrite": True}
    graph = {
        "1": {"class_type": "L2PSaveDelta", "inputs": save | {"overwrite": False}},
        "2": {"class_type": "L2PMergeDelta", "inputs": merge},
        "3": graphs.convert("own_source.safetensors", "own_init")["3"],
    }
    nodes = {"1": "own_delta", "2": "own_merged", "3": "own_init"}
    assert nodes.keys() <= server.run(graph).ran
    assert not nodes.keys() & server.run(graph).ran
    for node, name in nodes.items():
        (models / f"{name}.safetensors").unlink()
        run = server.run(graph)
        assert run.error is None and node in run.ran and (models / f"{name}.safetensors").is_file()
        assert not nodes.keys() & server.run(graph).ran
    (models / "own_init.safetensors").write_bytes(b"a stranger's")
    assert "already exists" in sentence(server.run(graph))


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_shards_are_offered_once_and_work_everywhere(server: Server, models: Path) -> None:
    """A folder of shards, as Z-Image is published, behind a link to another disk."""
    elsewhere = server.base / "other disk"
    elsewhere.mkdir()
    write_shards(to_comfy(golden.diffusers_weights()), elsewhere, "model")
    (models / "sharded").symlink_to(elsewhere)
    assert [name for name in options_of(server, "L2PLoader", "file") if "sharded" in name] == ["sharded"]
    run = server.run(graphs.loader("sharded"))
    assert run.error is None, run.error["exception_message"]
    write_shards(load_tensors(tiny.SOURCE_PATH)[0], models / "latent", "model")
    run = server.run(graphs.convert("latent", "from_shards"))
    assert run.error is None, run.error["exception_message"]
    data_folders.tiny_set(server.base / "datasets" / "of_shards", 2)
    run = server.run(graphs.train("on_shards", model="latent", dataset="of_shards", steps=2))
    assert run.error is None, run.error["exception_message"]
    merge = {"delta": "on_shards.safetensors", "base": "latent", "filename": "shards_merged", "overwrite": False}
    run = server.run({"1": {"class_type": "L2PMergeDelta", "inputs": merge}})
    assert run.error is None, run.error["exception_message"]


def test_the_hosts_own_loaders_make_the_image_of_ours(server: Server, models: Path) -> None:
    """The graph that everyone knows, from Load Checkpoint to VAE Decode; and Load Diffusion Model beside L2P Loader."""
    checkpoints = models.parent / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    delta.merge(tiny.SOURCE_PATH.with_name("delta.safetensors"), tiny.SOURCE_PATH, models / "whole.safetensors")
    weights = load_file(models / "whole.safetensors")
    save_file({COMFY_PREFIX + key: value for key, value in weights.items()}, checkpoints / "all_in_one.safetensors")
    graph = graphs.ksampler()
    expected = picture(server, server.run(graph), "8").astype(int)
    loaders = [
        {"class_type": "UNETLoader", "inputs": {"unet_name": "whole.safetensors", "weight_dtype": "default"}},
        graphs.loader("whole.safetensors")["1"],
        graphs.loader("all_in_one.safetensors")["1"],
        {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "all_in_one.safetensors"}},
    ]
    for loader in loaders:
        graph["9"] = loader
        graph["6"]["inputs"]["model"] = ["9", 0]
        assert (picture(server, server.run(graph), "8") == expected).all(), loader["class_type"]
    graph["4"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    graph["7"] = {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["9", 2]}}
    assert abs(picture(server, server.run(graph), "8") - expected).max() <= 1


def test_a_delta_in_load_diffusion_model_ends_in_a_sentence(server: Server, models: Path) -> None:
    shutil.copy(tiny.SOURCE_PATH.with_name("delta.safetensors"), models / "only_a_delta.safetensors")
    graph = graphs.loader("")
    graph["1"] = {"class_type": "UNETLoader", "inputs": {"unet_name": "only_a_delta.safetensors"}}
    graph["1"]["inputs"]["weight_dtype"] = "default"
    assert "If it is a delta, load it with L2P Loader" in sentence(server.run(graph))


def test_what_the_hosts_loader_says_of_a_damaged_file_is_explained(server: Server, models: Path) -> None:
    """In files that fail before any row of the host's list is asked; other models' are nobody's business of ours."""
    weights = golden.diffusers_weights()
    first = "noise_refiner.0.attention"
    linears = [
        key.removesuffix(".weight") for key in to_comfy(weights) if key.endswith(("attention.out.weight", "w1.weight"))
    ]
    marks = {"layers": {COMFY_PREFIX + layer: {"format": "float8_e4m3fn"} for layer in linears}}
    fp8 = to_comfy(weights)
    for layer in linears:
        scale = fp8[f"{layer}.weight"].abs().amax() / 448
        fp8[f"{layer}.weight"] = (fp8[f"{layer}.weight"] / scale).to(torch.float8_e4m3fn)
        fp8[f"{layer}.weight_scale"] = scale
    bias = {key: weights[key] + 1 for key in weights if key.endswith("out_conv.bias")}
    damaged: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
        "k": (without(weights, f"{first}.to_k.weight"), {}, f"'{first}.to_k.weight' is missing"),
        "norm": (without(weights, f"{first}.norm_k.weight"), {}, f"'{first}.k_norm.weight' is missing"),
        "comfy": (without(to_comfy(weights), f"{first}.k_norm.weight"), {}, f"'{first}.k_norm.weight' is missing"),
        "marked": (fp8, {"_quantization_metadata": json.dumps(marks)}, "load it with L2P Loader"),
        "delta": (bias, {KIND: DELTA}, "only the trained part of an L2P model"),
        "cut": (weights, {}, "is incomplete: it has"),
        "latent": (without(to_comfy(weights), "local_decoder.", "cap_embedder.1"), {}, "^$"),
    }
    for name, (tensors, metadata, expected) in damaged.items():
        path = models / f"bad_{name}.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
        if name == "cut":
            os.truncate(path, path.stat().st_size // 2)
        inputs = {"unet_name": path.name, "weight_dtype": "default"}
        run = server.run({**graphs.loader(""), "1": {"class_type": "UNETLoader", "inputs": inputs}})
        assert run.error is not None and run.error["current_inputs"]["unet_name"] == [path.name]
        said = server.get(f"/l2p/refused?folder=diffusion_models&name={path.name}").decode()
        assert re.search(expected, said) and str(server.base) not in said and "\n" not in said
        path.unlink()
    for folder, name in (("diffusion_models", "../secret"), ("checkpoints", "none.safetensors")):
        assert server.get(f"/l2p/refused?folder={folder}&name={name}") == b""


def without(tensors: dict[str, Any], *beginnings: str) -> dict[str, Any]:
    return {key: value for key, value in tensors.items() if not key.startswith(beginnings)}
