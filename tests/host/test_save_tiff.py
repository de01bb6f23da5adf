"""Full bit depth in the running host: from its loader through inpainting into our TIFF, with its names and metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
import tifffile
from host_server import Run, Server
from PIL import Image
from test_server import picture, sentence

RAMP = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)


def saved(server: Server, run: Run, node: str) -> Path:
    """The file that Save TIFF wrote."""
    assert run.error is None, run.error
    (file,) = run.outputs[node]["files"]
    return server.base / "output" / file["subfolder"] / file["filename"]


def inpainting(**saving: Any) -> graphs.Json:
    """A ramp of 16 bits, its middle repainted: node 5 saves."""
    graph = graphs.demo(image=["6", 0], mask=["9", 0], steps=2)
    graph["6"] = {"class_type": "LoadImage", "inputs": {"image": "ramp.png"}}
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
    return server


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
