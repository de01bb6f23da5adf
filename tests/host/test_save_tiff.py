"""Full bit depth in the running host: from its loader through inpainting into our TIFF, with its names and metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
import tifffile
import torch
from host_server import Refused, Run, Server
from PIL import Image
from test_server import picture, sentence

from comfyui_l2p.l2p_core.dataset import picture_files

COLOURS = np.random.default_rng(3).integers(0, 65536, (64, 64, 3), np.uint16)
RAMP = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)


def saved(server: Server, run: Run, node: str) -> Path:
    """The file that Save TIFF wrote."""
    assert run.error is None, run.error
    (file,) = run.outputs[node]["files"]
    return server.base / "output" / file["subfolder"] / file["filename"]


def inpainting(image: str = "ramp.png", **saving: Any) -> graphs.Json:
    """A ramp of 16 bits, its middle repainted: node 5 saves."""
    graph = graphs.demo(image=["6", 0], mask=["9", 0], steps=2)
    ours = {"class_type": "L2PLoadDeepImage", "inputs": {"image": image, "dicom": "window", "frame": 1}}
    graph["6"] = {"class_type": "LoadImage", "inputs": {"image": image}} if image == "ramp.png" else ours
    graph["7"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 64, "height": 64}}
    graph["8"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 20, "height": 20}}
    add = {"destination": ["7", 0], "source": ["8", 0], "x": 13, "y": 7, "operation": "add"}
    graph["9"] = {"class_type": "MaskComposite", "inputs": add}
    inputs = {"images": ["4", 0], "filename_prefix": "deep/ramp", "depth": "16-bit", **saving}
    graph["5"] = {"class_type": "L2PSaveTIFF", "inputs": inputs}
    return graph


@pytest.fixture(scope="module")
def ramp(server: Server) -> Server:
    Image.fromarray(RAMP).save(server.base / "input" / "ramp.png")
    (server.base / "input" / "colours").mkdir()
    for name, depth in (("colours.png", "16"), ("colours/floats.tif", "float")):
        content = picture_files.writer(name, depth).encode(torch.from_numpy(COLOURS / 32767.5 - 1).movedim(-1, 0), {})
        (server.base / "input" / name).write_bytes(content)
    return server


def loading(image: str, **inputs: Any) -> graphs.Json:
    """An image in full depth: node 2 saves it as floats, node 3 its mask."""
    return {
        "1": {"class_type": "L2PLoadDeepImage", "inputs": {"image": image, "dicom": "window", "frame": 1, **inputs}},
        "2": {
            "class_type": "L2PSaveTIFF",
            "inputs": {"images": ["1", 0], "filename_prefix": "loaded", "depth": "32-bit float"},
        },
        "3": {"class_type": "MaskToImage", "inputs": {"mask": ["1", 1]}},
        "4": {
            "class_type": "L2PSaveTIFF",
            "inputs": {"images": ["3", 0], "filename_prefix": "mask", "depth": "32-bit float"},
        },
    }


def test_a_ramp_of_16_bits_comes_out_bit_for_bit_outside_the_mask(ramp: Server) -> None:
    kept = np.ones((64, 64), bool)
    kept[7:27, 13:33] = False
    run = ramp.run(inpainting())
    path = saved(ramp, run, "5")
    found = tifffile.imread(path)
    assert path.name == "ramp_00001_.tif" and found.dtype == np.uint16 and found.shape == (64, 64, 3)
    assert (found[kept] == RAMP[kept][:, None]).all()
    assert (found[~kept] != RAMP[~kept][:, None]).any(-1).mean() > 0.9
    assert picture(ramp, run, "5").shape == (64, 64, 3), "browsers show no TIFF"
    with tifffile.TiffFile(path) as file:
        assert json.loads(file.pages[0].description)["prompt"]["5"]["class_type"] == "L2PSaveTIFF"
    floats = saved(ramp, ramp.run(inpainting(depth="32-bit float")), "5")
    assert floats.name == "ramp_00002_.tif"
    assert (np.rint(tifffile.imread(floats)[kept].astype(np.float64) * 65535) == RAMP[kept][:, None]).all()


def test_a_deleted_file_is_saved_again_and_no_other(ramp: Server) -> None:
    graph = loading("ramp.png")
    paths = [saved(ramp, ramp.run(graph), node) for node in ("2", "4")]
    before = [path.stat().st_mtime_ns for path in paths]
    ramp.run(graph)
    assert [path.stat().st_mtime_ns for path in paths] == before, "nothing changed, so the host's cache answers"
    count = len(list(paths[0].parent.glob("*.tif")))
    paths[0].unlink()
    ramp.run(graph)
    assert len(list(paths[0].parent.glob("*.tif"))) == count and paths[1].stat().st_mtime_ns == before[1]


@pytest.mark.parametrize("image", ["colours.png", "colours/floats.tif"])
def test_colours_of_16_bits_come_out_bit_for_bit_outside_the_mask(ramp: Server, image: str) -> None:
    kept = np.ones((64, 64), bool)
    kept[7:27, 13:33] = False
    run = ramp.run(inpainting(image))
    found = tifffile.imread(saved(ramp, run, "5"))
    assert (found[kept] == COLOURS[kept]).all()
    assert (found[~kept] != COLOURS[~kept]).any(-1).mean() > 0.9
    assert picture(ramp, run, "6").shape == (64, 64, 3), "browsers show no TIFF"


def test_floats_and_transparency_are_loaded_as_they_are(ramp: Server) -> None:
    values = np.random.default_rng(0).random((5, 7, 4)).astype(np.float32)
    values[0, 0], values[0, 1] = (1.5, -0.25, 1e-6, 1), (0.1, 0.2, 0.3, 0)
    options: dict[str, Any] = {"photometric": "rgb", "extrasamples": ["unassalpha"]}
    tifffile.imwrite(ramp.base / "input" / "clear.tif", values, **options)
    run = ramp.run(loading("clear.tif"))
    assert (tifffile.imread(saved(ramp, run, "2")) == values[..., :3]).all()
    assert np.allclose(tifffile.imread(saved(ramp, run, "4"))[..., 0], 1 - values[..., 3])


@pytest.mark.parametrize(
    ("image", "inputs", "said"),
    [
        ("../elsewhere.png", {}, "no file '../elsewhere.png' in the input folder"),
        ("/etc/passwd", {}, "no file '/etc/passwd' in the input folder"),
        ("colours.png", {"frame": 2}, "colours.png has 1 frame: set frame to 1."),
        ("colours.png", {"dicom": "wide"}, 'dicom must be "window", "full" or a centre and a width'),
        ("torn.tif", {}, "torn.tif cannot be used as an image: it is damaged or truncated"),
        ("text.png", {}, "text.png cannot be used as an image: it is not an image of a known format"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(ramp: Server, image: str, inputs: dict[str, Any], said: str) -> None:
    (ramp.base / "elsewhere.png").write_bytes((ramp.base / "input" / "colours.png").read_bytes())
    floats = (ramp.base / "input" / "colours" / "floats.tif").read_bytes()
    (ramp.base / "input" / "torn.tif").write_bytes(floats[: len(floats) // 2])
    (ramp.base / "input" / "text.png").write_text("no image")
    try:
        text = sentence(ramp.run(loading(image, **inputs)))
    except Refused as refused:  # what is known of a name alone, before anything runs
        text = refused.sentences()
    assert said in text and str(ramp.base) not in text


def test_values_beyond_white_reach_a_float_file_and_are_reported(ramp: Server) -> None:
    graph = graphs.ksampler(steps=2)
    graph["7"]["inputs"]["clamp"] = False
    graph["8"] = {
        "class_type": "L2PSaveTIFF",
        "inputs": {"images": ["7", 0], "filename_prefix": "beyond", "depth": "32-bit float"},
    }
    values = tifffile.imread(saved(ramp, ramp.run(graph), "8"))
    assert values.dtype == np.float32 and (values.min() < 0 or values.max() > 1)
    said = f"Values from {values.min():.4f} to {values.max():.4f};"
    assert said in ramp.log_text()


@pytest.mark.parametrize("prefix", ["../outside", "/outside", "a/../../outside"])
def test_files_stay_in_the_output_folder(ramp: Server, prefix: str) -> None:
    text = sentence(ramp.run(inpainting(filename_prefix=prefix)))
    assert "leads out of the output folder" in text and str(ramp.base) not in text
    assert not list(ramp.base.parent.glob("outside*")) and not list(ramp.base.glob("outside*"))
