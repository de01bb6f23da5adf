"""`l2p synth`: from the bundled source, and through hosts that fail in every way."""

from __future__ import annotations

import copy
import csv
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_host import WORKFLOW, FakeHost
from PIL import Image
from test_cli import mistake

from comfyui_l2p.l2p_core import tiny
from comfyui_l2p.l2p_core.dataset import readers
from comfyui_l2p.l2p_core.dataset.image_folder import open_folder
from comfyui_l2p.l2p_core.dataset.loader import Loader
from comfyui_l2p.l2p_core.dataset.synthesis import SynthesisFolder, items
from comfyui_l2p.l2p_core.patch_pairs import FILE, PatchPairs
from comfyui_l2p.l2p_core.tiny.shapes import IMAGE_SIZE, all_captions
from comfyui_l2p.train import fleet as fleet_module
from comfyui_l2p.train import host_client
from comfyui_l2p.train.cli import main
from comfyui_l2p.train.fleet import Fleet
from comfyui_l2p.train.host_client import HostClient, HostGone
from comfyui_l2p.train.workflow import Workflow

pytestmark = pytest.mark.usefixtures("unflushed")

RECIPE = """
[model]
base = "tiny"
head_width = 0.125

[data]
kind = "folder"
path = "set"
size = 64
batch_size = 2

[training]
steps = 1
blocks = 1
precision = "fp32"
gradient_checkpointing = false
"""
PROMPTS = [f'a "{name}", asleep' for name in ("fox", "hare", "owl", "newt", "crow")]


@pytest.fixture
def workflow(tmp_path: Path) -> Path:
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(WORKFLOW), encoding="utf-8-sig")  # as editors on Windows save it
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


def command(workflow: Path, folder: Path, prompts: Path, *hosts: FakeHost) -> list[str]:
    addresses = [word for host in hosts for word in ("--host", host.address)]
    arguments = [*map(str, ("synth", workflow, folder)), "--prompts", str(prompts), "--seeds", "2", *addresses]
    return [*arguments, "--patience", "0.2"]


def check(folder: Path, count: int = 10) -> None:
    """All images are there, each of its own seed, and read as training data."""
    listing = readers.read(folder)
    assert not listing.problems and len(listing.samples) == count
    for sample in listing.samples:
        assert sample.seed is not None
        with Image.open(sample.path) as image:
            assert image.mode == "RGB" and image.getpixel((0, 0)) == tuple(sample.seed.to_bytes(6, "big")[-3:])


def test_hosts_share_the_work(tmp_path: Path, workflow: Path, prompts: Path) -> None:
    both_at_work = threading.Barrier(2)

    def behave(number: int) -> str:
        if number == 1:
            both_at_work.wait(60)
        return "ok"

    with FakeHost(behave) as one, FakeHost(behave) as two:
        assert main(command(workflow, tmp_path / "set", prompts, one, two)) == 0
        assert len(one.taken) + len(two.taken) == 10
        assert not one.history and not two.history
        assert {taken["1"]["inputs"]["text"] for taken in one.taken + two.taken} == {f"photo, {p}" for p in PROMPTS}
        assert {taken["3"]["class_type"] for taken in one.taken} == {"PreviewImage"}
    check(tmp_path / "set")
    with (tmp_path / "set" / "metadata.csv").open(newline="", encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    assert (row["steps"], row["cfg"], row["sampler"], row["scheduler"]) == ("8", "1.5", "euler", "")


def test_a_host_that_goes_gives_its_work_to_the_others(
    tmp_path: Path, workflow: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeHost() as good, FakeHost() as bad:

        def dies(number: int) -> str:
            bad.server.socket.close()
            return "hang"

        bad.behave = dies
        assert main(command(workflow, tmp_path / "set", prompts, bad, good)) == 0
        assert len(bad.taken) >= 1 and len(good.taken) == 10
    check(tmp_path / "set")
    assert f"{bad.address} does not answer" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["error", "two", "broken", "eps", "huge", "refuse", "drop"])
def test_a_host_that_always_fails_is_given_up(
    tmp_path: Path,
    workflow: Path,
    prompts: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setattr(host_client, "IMAGE_BYTES", 1 << 19)
    sentences = {
        "error": "out of memory",
        "two": "returns 2 images, not one: use batch size 1",
        "broken": "cannot be read",
        "eps": "not an image of a known format (PNG, JPEG, WEBP)",
        "huge": "its answer is larger than the limit of 1 MB",
        "refuse": "does not accept the workflow: Value not in list unet_name",
        "drop": "has dropped a workflow",
    }
    with FakeHost(lambda number: kind) as bad:
        said = mistake(capsys, *command(workflow, tmp_path / "set", prompts, bad))
        assert (
            "10 images could not be made" in said and sentences[kind] in said and "Start again to make the rest" in said
        )
        assert not list((tmp_path / "set").glob("*.png"))
        with FakeHost() as good:
            assert main(command(workflow, tmp_path / "set", prompts, bad, good)) in (0, 2)
            assert main(command(workflow, tmp_path / "set", prompts, good)) == 0
    check(tmp_path / "set")


def test_what_is_said_of_a_host_that_is_gone(
    tmp_path: Path, workflow: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = tmp_path / "one.txt"
    one.write_text("a fox\n", encoding="utf-8")
    with FakeHost() as gone:
        pass
    assert main([*command(workflow, tmp_path / "one", one, gone), "--seeds", "1"]) == 2
    alone = capsys.readouterr().err
    assert "; waiting for it" in alone and "other hosts" not in alone and "1 image could not be made" in alone
    with FakeHost() as good:
        assert main(command(workflow, tmp_path / "set", prompts, gone, good)) == 0
    assert "; the other hosts take over its images" in capsys.readouterr().err


def test_an_image_that_fails_for_good_leaves_the_others(
    tmp_path: Path, workflow: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeHost() as host:
        host.behave = lambda number: "error" if "newt" in host.taken[-1]["1"]["inputs"]["text"] else "ok"
        said = mistake(capsys, *command(workflow, tmp_path / "set", prompts, host))
        assert "2 images could not be made (" in said and "out of memory" in said
    check(tmp_path / "set", 8)


def test_an_image_black_throughout_is_not_one(
    tmp_path: Path, workflow: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a host saves when its model's numbers overflow."""
    with FakeHost() as host:
        host.behave = lambda number: "black" if "newt" in host.taken[-1]["1"]["inputs"]["text"] else "ok"
        said = mistake(capsys, *command(workflow, tmp_path / "set", prompts, host))
        assert "2 images could not be made (" in said and "entirely black" in said
    check(tmp_path / "set", 8)


def test_it_is_stopped_and_goes_on(tmp_path: Path, workflow: Path, prompts: Path) -> None:
    wanted, template = items(PROMPTS, 2), Workflow.load(workflow)
    with FakeHost(lambda number: "ok" if number <= 4 else "hang") as host:
        made = SynthesisFolder(tmp_path / "set", wanted, template.settings())
        written: list[Any] = []
        fleet = Fleet([HostClient(host.address)], template, 1.0, lambda sentence: None)
        with pytest.raises(KeyboardInterrupt):
            for item in fleet.make(made, lambda: len(written) == 4 and len(host.running) == 2):
                written.append(item)
        assert len(host.interrupts) == 2 and not host.running
        check(tmp_path / "set", 4)
        host.behave = lambda number: "ok"
        assert main(command(workflow, tmp_path / "set", prompts, host)) == 0
        assert len(host.taken) == 4 + 2 + 6
    check(tmp_path / "set")


def test_a_host_that_does_not_answer_delays_a_stop_by_a_moment_only(
    tmp_path: Path, workflow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "_GRACE", 0.1)
    template = Workflow.load(workflow)
    made = SynthesisFolder(tmp_path / "set", items(PROMPTS, 2), template.settings())
    with socket.create_server(("127.0.0.1", 0)) as silent:
        fleet = Fleet([HostClient(f"127.0.0.1:{silent.getsockname()[1]}")], template, 1.0, lambda sentence: None)
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            list(fleet.make(made, lambda: time.monotonic() > started + 0.5))
    assert time.monotonic() < started + 20, "requests may take a minute"


def test_a_fault_of_our_own_ends_the_work(tmp_path: Path, workflow: Path) -> None:
    template = Workflow.load(workflow)
    made = SynthesisFolder(tmp_path / "set", items(PROMPTS, 2), template.settings())
    template.filled = lambda prompt, seed: 1 / 0  # type: ignore[assignment, return-value]
    fleet = Fleet([HostClient("127.0.0.1:1")], template, 1.0, lambda sentence: None)
    with pytest.raises(ZeroDivisionError):
        list(fleet.make(made, lambda: False))


def test_prompts_and_seeds_have_their_places() -> None:
    nodes = copy.deepcopy(WORKFLOW)
    nodes["2"]["inputs"]["seed"] = ["4", 0]
    nodes["4"] = {"class_type": "PrimitiveInt", "inputs": {"value": 3}}
    nodes["5"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": 7, "note": "{prompt} twice: {prompt}"}}
    filled = Workflow(nodes, "w").filled('a "fox"\\', 42)
    assert filled["1"]["inputs"] == {"text": 'photo, a "fox"\\', "clip": ["9", 1]}
    assert filled["2"]["inputs"]["seed"] == ["4", 0] and filled["4"]["inputs"]["value"] == 42
    assert filled["5"]["inputs"] == {"noise_seed": 42, "note": 'a "fox"\\ twice: a "fox"\\'}
    assert nodes["5"]["inputs"]["noise_seed"] == 7


def test_the_settings_follow_the_workflow_and_not_its_seed() -> None:
    changed, reseeded = copy.deepcopy(WORKFLOW), copy.deepcopy(WORKFLOW)
    changed["9"] = {"class_type": "LoraLoader", "inputs": {"lora_name": "x"}}
    reseeded["2"]["inputs"]["seed"] = 6
    first = Workflow(WORKFLOW, "w").settings()
    assert Workflow(reseeded, "w").settings() == first
    assert Workflow(changed, "w").settings()["workflow"] != first["workflow"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not a workflow in API format"),
        ('{"nodes": [], "links": []}', "export it in API format"),
        (json.dumps(WORKFLOW).replace("{prompt}", "a fox"), "contains {prompt}: write it as the positive prompt"),
        (json.dumps(WORKFLOW).replace('"seed"', '"number"'), "has an input named seed or noise_seed"),
    ],
)
def test_what_is_no_workflow_is_one_line(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str], content: str, sentence: str
) -> None:
    path = tmp_path / "w.json"
    path.write_text(content, encoding="utf-8")
    assert sentence in mistake(capsys, "synth", path, tmp_path / "set", "--prompts", prompts, "--host", "127.0.0.1:1")
    assert not (tmp_path / "set").exists()


def test_mistakes_are_one_line(
    tmp_path: Path, workflow: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "set"
    assert "--host 127.0.0.1:8188" in mistake(capsys, "synth", workflow, target, "--prompts", prompts)
    assert "--prompts FILE" in mistake(capsys, "synth", workflow, target, "--host", "x:1")
    assert "not the address" in mistake(capsys, "synth", workflow, target, "--prompts", prompts, "--host", "ftp://x")
    assert "needs no host" in mistake(capsys, "synth", "tiny", target, "--host", "x:1")
    assert "does not know the word 'fox'" in mistake(capsys, "synth", "tiny", target, "--prompts", prompts)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("entry", [
    [1], "x", {"outputs": [1]}, {"outputs": {"3": "x"}}, {"outputs": {"3": {"images": [5]}}},
    {"outputs": {}, "status": [1]}, {"status": {"status_str": "error", "messages": 5}},
], ids=str)  # fmt: skip
def test_an_answer_of_another_shape_is_no_answer(entry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one host among several, so that it must not end the others' work."""
    monkeypatch.setattr(FakeHost, "_entry", staticmethod(lambda *_: entry))
    with FakeHost() as host, pytest.raises(HostGone, match="does not answer as ComfyUI does"):
        HostClient(host.address).make(WORKFLOW, lambda: False)


def test_an_answer_nested_without_end_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeHost, "take", lambda *_: (200, b"[" * 100_000))
    with FakeHost() as host, pytest.raises(HostGone, match="does not answer as ComfyUI does"):
        HostClient(host.address).make(WORKFLOW, lambda: False)


def test_the_bundled_source_makes_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("prompt\na red circle in the centre on a white background\n", encoding="utf-8")
    arguments = ["synth", "tiny", str(tmp_path / "set"), "--prompts", str(path), "--steps", "2"]
    assert main([*arguments, "--seeds", "2"]) == 0
    assert "2 images, 2 of them made now" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    assert main([*arguments, "--seeds", "3"]) == 0
    assert "3 images, 1 of them made now" in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items() if path.suffix == ".png")
    listing = readers.read(tmp_path / "set")
    assert not listing.problems and len({sample.seed for sample in listing.samples}) == 3
    assert "made with steps 2, not 3" in mistake(capsys, *arguments[:-1], "3")


def test_pairs_that_a_run_could_not_write_are_made_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The images stay when the disk is full at the end, or when a kill comes before the pairs are saved."""
    folder, prompts = tmp_path / "set", tmp_path / "prompts.txt"
    prompts.write_text("\n".join(all_captions()[:2]), encoding="utf-8")
    pairs = folder / FILE
    pairs.mkdir(parents=True)  # nothing can be written there
    command = ["synth", "tiny", str(folder), "--prompts", str(prompts), "--steps", "1", "--seeds"]
    assert main([*command, "1"]) == 2 and len(list(folder.glob("*.png"))) == 2
    pairs.rmdir()
    assert main([*command, "1"]) == 0
    assert "2 images, 0 of them made now" in capsys.readouterr().out
    of_two, each = pairs.read_bytes(), (IMAGE_SIZE // 16) ** 2
    assert PatchPairs.load(pairs).count == 2 * each
    assert main([*command, "2"]) == 0
    of_four = PatchPairs.load(pairs)
    assert of_four.count == 4 * each
    pairs.write_bytes(of_two)
    assert main([*command, "2"]) == 0
    made_up = PatchPairs.load(pairs)
    assert made_up.count == 4 * each
    for name, value in made_up.sums.items():  # of images that were rounded to 8 bits
        torch.testing.assert_close(value, of_four.sums[name], rtol=0.02, atol=0.02 * float(value.abs().max()))
    whole = pairs.read_bytes()
    assert main([*command, "2"]) == 0 and pairs.read_bytes() == whole
    pairs.unlink()
    image = next(folder.glob("*.png"))
    image.write_bytes(image.read_bytes()[:60] + b"x" * 40 + image.read_bytes()[100:])
    assert f"{image}: " in (said := mistake(capsys, *command, "2")) and "delete it, and it is made again" in said


def test_training_reads_it_with_the_images_own_seeds(tmp_path: Path) -> None:
    folder, prompts = tmp_path / "set", tmp_path / "prompts.txt"
    prompts.write_text("\n".join(all_captions()[:2]), encoding="utf-8")
    assert main(["synth", "tiny", str(folder), "--prompts", str(prompts), "--seeds", "2", "--steps", "1"]) == 0
    data, words = open_folder(folder, area=IMAGE_SIZE**2, multiple=16), tiny.load_words()
    wanted = {item.seed: words.encode(item.prompt) for item in items(all_captions()[:2], 2)}
    with Loader(data, words.encode, batch_size=4, seed=0) as loader:
        batch = loader.batch(0)
    assert batch.pixels.shape == (4, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert batch.seeds is not None and sorted(filter(None, batch.seeds)) == sorted(wanted)
    for seed, caption in zip(batch.seeds, batch.captions, strict=True):
        assert seed is not None and torch.equal(caption, wanted[seed])
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE, encoding="utf-8")
    assert main(["train", str(recipe), "--output", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "delta.safetensors").exists()
