"""Synthesize L2P Dataset on a running server: a folder to train on, that goes on where it stopped."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import graphs
import pytest
import torch
from host_server import Refused, Run, Server

from comfyui_l2p.l2p_core import tiny
from comfyui_l2p.l2p_core.dataset import readers
from comfyui_l2p.l2p_core.dataset.images import as_pixels, load
from comfyui_l2p.l2p_core.files.lock import LOCK, held
from comfyui_l2p.l2p_core.patch_pairs import FILE, PatchPairs
from comfyui_l2p.l2p_core.tiny import image_set
from comfyui_l2p.l2p_core.tiny.shapes import evaluation_captions

OTHER = "a green triangle at the top left on a black background"


@pytest.fixture
def data(server: Server) -> Iterator[Path]:
    """The server's datasets folder, without what these tests put there."""
    folder = server.base / "datasets"
    yield folder
    for name in ("made", "deep"):
        shutil.rmtree(folder / name, ignore_errors=True)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def sentence(run: Run) -> str:
    assert run.error is not None
    return str(run.error["exception_message"])


def test_prompts_become_a_data_set(server: Server, data: Path) -> None:
    (server.base / "input" / "more.csv").write_text(f"caption,n\n{OTHER},1\n", encoding="utf-8")
    run = server.run(graphs.synthesize(prompt_file="more.csv", dataset="deep/made", batch_size=2))
    assert run.error is None, run.error
    listing = readers.read(data / "deep" / "made")
    assert not listing.problems and len({sample.seed for sample in listing.samples}) == 4
    assert sorted(sample.caption for sample in listing.samples) == sorted([graphs.CAPTION, OTHER] * 2)
    first = rows(data / "deep" / "made")[0]
    settings = {"steps": "4", "cfg": "2.0", "sampler": "euler", "scheduler": "simple", "shift": "3.0", "width": "64"}
    assert settings.items() <= first.items()
    pairs = PatchPairs.load(data / "deep" / "made" / FILE)
    images = torch.stack([as_pixels(load(data / "deep" / "made" / sample.name, 64, 64)) for sample in listing.samples])
    again = PatchPairs(16, 16)
    again.add(images, tiny.load_autoencoder().encode(images))
    assert pairs.count == again.count == 4 * 16
    apart = (pairs.sums["zx"] - again.sums["zx"]).norm() / again.sums["zx"].norm()
    assert apart < 0.3, "the latents are those that the model reads"
    assert len(run.outputs["2"]["images"]) == 4
    assert run.progress[-1][1:] == (16, 16) and len(run.previews) >= 4
    assert run.texts[:2] == ["Encoding prompts: 1 of 2", "Encoding prompts: 2 of 2"]
    assert run.texts[2].startswith("2 of 4 images, about ") and run.texts[-1] == "4 images, 4 of them made now"


def test_it_is_stopped_and_goes_on(server: Server, data: Path) -> None:
    graph = graphs.synthesize(prompts=f"{graphs.CAPTION}\n{OTHER}", images_per_prompt=3)
    stopped = server.run(graph, interrupt_at=10)
    assert stopped.interrupted
    done = {path: path.stat().st_mtime_ns for path in (data / "made").glob("*.png")}
    assert len(done) == len(rows(data / "made")) and 2 <= len(done) < 6
    finished = server.run(graph)
    assert finished.error is None and finished.texts[-1] == f"6 images, {6 - len(done)} of them made now"
    assert len(rows(data / "made")) == 6
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())


def test_a_folder_that_another_process_fills_is_left_alone(server: Server, data: Path) -> None:
    """The other process is this one, with the table of its first image."""
    with held(data / "made", LOCK, "generates images", print):
        (data / "made" / "metadata.csv").write_text("image,prompt,seed\n", encoding="utf-8")
        said = sentence(server.run(graphs.synthesize()))
        assert re.search(r"made is in use: process \d+ on .* generates images there", said), said
        assert {path.name for path in (data / "made").iterdir()} == {LOCK, "metadata.csv"}
        (data / "made" / "metadata.csv").unlink()
    assert server.run(graphs.synthesize()).error is None


def test_what_is_missing_is_made_again_and_is_the_same(server: Server, data: Path) -> None:
    assert server.run(graphs.synthesize()).error is None
    gone = sorted((data / "made").glob("*.png"))[0]
    content = gone.read_bytes()
    gone.unlink()
    for _ in range(2):
        assert server.run(graphs.synthesize()).texts[-1] == "2 images, 1 of them made now"
        assert gone.read_bytes() == content
        assert not server.run(graphs.synthesize()).ran, "it runs though nothing has changed"
        gone.unlink()


def test_pairs_that_a_run_could_not_write_are_made_up(server: Server, data: Path) -> None:
    """As `l2p synth` does, see tests/test_synth.py."""
    pairs = data / "made" / FILE
    pairs.mkdir(parents=True)  # nothing can be written there
    assert server.run(graphs.synthesize()).error is not None and len(list((data / "made").glob("*.png"))) == 2
    pairs.rmdir()
    run = server.run(graphs.synthesize())
    assert run.error is None, run.error
    assert run.texts[0] == "Pairing earlier images with their latents: 0 of 2"
    assert run.texts[-1] == "2 images, 0 of them made now"
    images = torch.stack([as_pixels(load(path, 64, 64)) for path in (data / "made").glob("*.png")])
    expected = PatchPairs(16, 16)
    expected.add(images, tiny.load_autoencoder().encode(images))
    made_up = PatchPairs.load(pairs)
    assert made_up.count == expected.count
    for name, value in made_up.sums.items():
        torch.testing.assert_close(value, expected.sums[name], rtol=1e-3, atol=1e-3 * float(value.abs().max()))
    image = next((data / "made").glob("*.png"))
    image.write_bytes(image.read_bytes()[:60] + b"x" * 40 + image.read_bytes()[100:])
    pairs.unlink()
    said = sentence(server.run(graphs.synthesize()))
    assert said.startswith(f"datasets/made/{image.name}: ") and "delete it, and it is made again" in said


def test_a_pixel_model_needs_no_vae(server: Server, data: Path) -> None:
    graph = graphs.synthesize(images_per_prompt=1)
    graph["1"]["class_type"] = "L2PDemo"
    del graph["2"]["inputs"]["vae"]
    assert server.run(graph).error is None
    (row,) = rows(data / "made")
    assert row["model"] == "source.safetensors + delta.safetensors"


def test_the_outputs_are_wired_on(server: Server, data: Path) -> None:
    graph = graphs.synthesize(images_per_prompt=1)
    for node, output in (("3", 0), ("4", 1)):
        graph[node] = {"class_type": "PreviewAny", "inputs": {"source": ["2", output]}}
    graph["5"] = {"class_type": "PreviewImage", "inputs": {"images": ["2", 2]}}
    run = server.run(graph)
    assert run.outputs["3"]["text"] == ["made"] and run.outputs["4"]["text"] == ["1"]
    assert len(run.outputs["5"]["images"]) == 1


def test_train_l2p_takes_it_over_a_wire(server: Server, data: Path) -> None:
    """In one go, from nothing: the data set is made, then trained on with the seeds of its images."""
    graph = graphs.train("wired", steps=2)
    made = graphs.synthesize(prompts=f"{graphs.CAPTION}\n{OTHER}", dataset="deep/wired")
    graph |= {"21": made["1"], "22": made["2"]}
    graph["22"]["inputs"] |= {"model": ["21", 0], "clip": ["21", 1], "vae": ["21", 2]}
    graph["2"]["inputs"]["dataset"] = ["22", 0]
    run = server.run(graph)
    assert run.error is None, run.error
    (live,) = run.outputs["2"]["l2p_training"]
    assert live["status"] == "finished" and live["curves"]["steps"] == [1, 2]
    assert len(rows(data / "deep" / "wired")) == 4


@pytest.mark.parametrize("name", ["../out", "a/../../out", "", " ", "."])
def test_it_stays_in_its_folder(server: Server, data: Path, name: str) -> None:
    with pytest.raises(Refused) as refused:
        server.run(graphs.synthesize(dataset=name))
    assert "data set is empty" in refused.value.sentences() or "leads out of the datasets" in refused.value.sentences()
    assert not (server.base / "out").exists()


def test_mistakes_are_the_nodes_own_sentences(server: Server, data: Path) -> None:
    before = set(data.rglob("*.png"))  # of other tests
    assert "There are no prompts" in sentence(server.run(graphs.synthesize(prompts=" \n")))
    graph = graphs.synthesize()
    del graph["2"]["inputs"]["vae"]
    assert "connect its VAE" in sentence(server.run(graph))
    assert "does not know the word 'hippo'" in sentence(server.run(graphs.synthesize(prompts="a hippo")))
    (server.base / "input" / "words.csv").write_text("words\nx\n", encoding="utf-8")
    assert "no column named prompt" in sentence(server.run(graphs.synthesize(prompt_file="words.csv")))
    assert set(data.rglob("*.png")) == before
    assert server.run(graphs.synthesize()).error is None
    assert "made with cfg 2.0, not 3.0" in sentence(server.run(graphs.synthesize(cfg=3.0)))


def test_a_conversion_is_fitted_to_a_data_set(server: Server, data: Path) -> None:
    graph = graphs.convert(graphs.TINY, "fitted")
    graph["3"]["inputs"]["dataset"] = "made"
    (data / "made").mkdir(parents=True)
    assert "made has none: choose a data set that it made" in sentence(server.run(graph))
    pairs, images = PatchPairs(16, 16), image_set.rendered(evaluation_captions(320), range(320))
    pairs.add(images, tiny.load_autoencoder().encode(images))
    pairs.save(data / "made" / FILE)
    run = server.run(graph)
    assert run.error is None, run.error
    assert "fitted to 5120 patches, explains" in str(run.outputs["3"])
    pairs.add(images, tiny.load_autoencoder().encode(images))
    pairs.save(data / "made" / FILE)
    graph["3"]["inputs"]["overwrite"] = True
    assert "fitted to 10240 patches, explains" in str(server.run(graph).outputs["3"]), "its data set has changed"
