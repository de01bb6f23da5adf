"""Compare L2P and Evaluate L2P in a running host: the pairs, the differences, the report and its page."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
from host_server import Refused, Run, Server
from PIL import Image

PROMPTS = f"{graphs.CAPTION}\n\na blue square"
Json = dict[str, Any]


def graph(**inputs: Any) -> Json:
    """Compare L2P with the bundled models, its images wired into Evaluate L2P: nodes 3 and 4."""
    settings = {
        "source": ["1", 0],
        "pixel": ["2", 0],
        "clip": ["1", 1],
        "vae": ["1", 2],
        "prompts": PROMPTS,
        "seed": 5,
        "width": 0,
        "height": 0,
        "source_steps": 2,
        "source_cfg": 2.0,
        "pixel_steps": 2,
        "pixel_cfg": -1,
        "sampler_name": "euler",
        "scheduler": "simple",
        "negative": "",
    }
    return {
        "1": {"class_type": "L2PDemoSource", "inputs": {}},
        "2": {"class_type": "L2PDemo", "inputs": {}},
        "3": {"class_type": "L2PCompare", "inputs": settings | inputs},
        "4": evaluate(source_images=["3", 0], pixel_images=["3", 1]),
    }


def evaluate(**inputs: Any) -> Json:
    settings = {"source_folder": "none", "pixel_folder": "none", "name": "kept", "patch": 16}
    return {"class_type": "L2PEvaluate", "inputs": settings | inputs}


def shown(server: Server, file: dict[str, str]) -> np.ndarray:
    path = server.base / "temp" / file["subfolder"] / file["filename"]
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def sentence(run: Run) -> str:
    assert run.error is not None
    return str(run.error["exception_message"])


@pytest.fixture(scope="module")
def compared(server: Server) -> Run:
    run = server.run(graph())
    assert run.error is None, run.error
    return run


def test_both_models_draw_the_same_prompts_and_seeds(server: Server, compared: Run) -> None:
    pairs = compared.outputs["3"]["l2p_pairs"]
    assert [pair["prompt"] for pair in pairs] == [graphs.CAPTION, "a blue square"]
    assert [pair["seed"] for pair in pairs] == ["5", "6"]
    for pair in pairs:
        source, pixel, difference = (shown(server, pair[side]) for side in ("source", "pixel", "difference"))
        assert source.shape == pixel.shape == (64, 64, 3)
        assert np.abs(np.abs(source - pixel) - difference).max() <= 1
        assert difference.max() > 20, "two models drew the same image"
    # The second pair's pixel image is Pixel Sampler's of its prompt and seed.
    alone = graphs.demo(seed=6, steps=2)
    alone["2"]["inputs"]["text"] = "a blue square"
    run = server.run(alone)
    (saved,) = run.outputs["5"]["images"]
    with Image.open(server.base / "output" / saved["filename"]) as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(shown(server, pairs[1]["pixel"]) - expected).max() <= 1


def test_its_images_are_evaluated_and_the_page_is_served(server: Server, compared: Run) -> None:
    (text,) = compared.outputs["4"]["text"]
    assert "2 pairs of images of 64 x 64 pixels" in text and "Grid of 16 pixels" in text
    assert compared.outputs["4"]["l2p_page"] == ["kept"]
    page = server.get("/l2p/evaluation?name=kept").decode()
    assert page.startswith("<!doctype html>") and page.count("data:image/jpeg;base64,") >= 4
    assert (server.base / "output" / "l2p_evaluations" / "kept.html").read_text(encoding="utf-8") == page
    for name in ("nothing", "../server", ""):
        with pytest.raises(urllib.error.HTTPError) as missing:
            server.get(f"/l2p/evaluation?name={name}")
        assert missing.value.code == 404


def test_folders_are_evaluated_and_again_only_when_they_change(server: Server) -> None:
    for side, shade in (("source", 90), ("pixel", 120)):
        folder = server.base / "output" / "sides" / side
        folder.mkdir(parents=True)
        noise = np.random.default_rng(shade).integers(0, shade, (48, 48, 3), dtype=np.uint8)
        for number in range(3):
            Image.fromarray(noise + np.uint8(number)).save(folder / f"{number}.png")
    offered = server.get("/object_info/L2PEvaluate")["L2PEvaluate"]["input"]["required"]["source_folder"]
    options = offered[1]["options"] if offered[0] == "COMBO" else offered[0]
    assert {"none", "output", "output/sides", "output/sides/pixel"} <= set(options)
    node = evaluate(source_folder="output/sides/source", pixel_folder="output/sides/pixel", name="of/folders")
    run = server.run({"1": node})
    assert run.error is None and "3 pairs" in run.outputs["1"]["text"][0]
    page = server.base / "output" / "l2p_evaluations" / "of" / "folders.html"
    assert page.is_file()
    assert not server.run({"1": node}).ran
    page.unlink()
    assert server.run({"1": node}).ran and page.is_file()
    (server.base / "output" / "sides" / "pixel" / "2.png").unlink()
    said = sentence(server.run({"1": node}))
    assert "output/sides/pixel lacks 1 of the 3 images of output/sides/source (2)" in said
    assert str(server.base) not in said


def test_mistakes_are_the_nodes_own_sentences(server: Server) -> None:
    def refused(node: Json) -> str:
        return sentence(server.run({"1": node}))

    assert "Nothing to compare" in refused(evaluate())
    wired = graph()
    del wired["4"]["inputs"]["pixel_images"]
    assert "pixel_images is not connected" in sentence(server.run(wired))
    with pytest.raises(Refused) as named:
        server.run({"1": evaluate(name="../x")})
    assert "leads out of output/l2p_evaluations" in named.value.sentences()
    assert "There are no prompts" in sentence(server.run(graph(prompts=" \n")))
    assert "is not an L2P model" in sentence(server.run(graph(pixel=["1", 0])))
    lacking = graph()
    del lacking["3"]["inputs"]["vae"]
    assert "connect its VAE" in sentence(server.run(lacking))
    assert "does not know the word 'hippo'" in sentence(server.run(graph(prompts="a hippo")))
    unequal = graph()
    unequal["5"] = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 3, "color": 9}}
    unequal["4"] = evaluate(source_images=["5", 0], pixel_images=["3", 1])
    assert "source_images has 3 images and pixel_images 2" in sentence(server.run(unequal))


def test_the_reports_folder_may_be_listed_but_not_left(server: Server) -> None:
    with pytest.raises(Refused):
        server.run({"1": evaluate(source_folder="output/../models", pixel_folder="output")})
    assert not (Path(server.base) / "x.html").exists()
