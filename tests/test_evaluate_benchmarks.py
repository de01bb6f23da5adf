"""Benchmarks: images in the scorers' own layouts, by every kind of model, resumed; the scorers' results read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_host import WORKFLOW, FakeHost
from PIL import Image
from test_cli import mistake

from comfyui_l2p.l2p_core import delta, flow, tiny
from comfyui_l2p.l2p_core.dataset.pictures import picture
from comfyui_l2p.l2p_core.tiny import bundled
from comfyui_l2p.train.cli import main
from comfyui_l2p.train.image_benchmarks import scores
from comfyui_l2p.train.image_benchmarks.benchmarks import BENCHMARKS, shots
from comfyui_l2p.train.image_benchmarks.layouts import GenEvalFolder
from comfyui_l2p.train.sampler import Sampler

pytestmark = pytest.mark.usefixtures("unflushed")

CAPTIONS = ["a red circle in the centre on a white background", "a blue square"]
LINES = [
    {"tag": tag, "include": [{"class": "shape", "count": 1}], "prompt": caption}
    for tag, caption in zip(("single_object", "colors"), CAPTIONS, strict=True)
]


@pytest.fixture
def geneval(tmp_path: Path) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    return path


@pytest.fixture
def dpg(tmp_path: Path) -> Path:
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, caption in zip(("partiprompts0.txt", "midjourney3.TXT"), CAPTIONS, strict=True):
        (folder / name).write_text(caption + "\n", encoding="utf-8")
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def tiny_model(kind: str, prompts: Path, output: Path, *more: str) -> list[str]:
    words = ["--model", "tiny", "--steps", "1", "--device", "cpu", *more]
    return ["evaluate", kind, str(prompts), str(output), *words]


def test_geneval_has_its_own_layout_and_seeds(
    geneval: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "made"
    assert main(tiny_model("geneval", geneval, output)) == 0
    printed = capsys.readouterr()
    assert "8 images, 8 of them made now" in printed.out
    assert "553 prompts and this copy 2" in printed.err
    images = [f"0000{prompt}/samples/000{number}.png" for prompt in range(2) for number in range(4)]
    assert files(output) == sorted([*images, "00000/metadata.jsonl", "00001/metadata.jsonl"])
    assert [json.loads((output / f"0000{i}/metadata.jsonl").read_text(encoding="utf-8")) for i in range(2)] == LINES
    # The seed is reset for every prompt, and its images take the noise of one generator in turn.
    generator = torch.Generator().manual_seed(42)
    noise = [torch.randn(1, 3, 64, 64, generator=generator) for _ in range(4)][2]
    words = tiny.load_words()
    expected = flow.sample(
        delta.load_model(bundled.DELTA, bundled.SOURCE, dtype=torch.float32).eval(),
        noise,
        [words.encode(CAPTIONS[1])],
        sigmas=flow.sigmas(1),
        cfg=2.0,
        negative=[words.encode("")],
    )[0]
    with Image.open(output / "00001/samples/0002.png") as image:
        assert np.abs(np.asarray(image).astype(int) - np.asarray(picture(expected)).astype(int)).max() <= 1

    missing = output / "00001/samples/0001.png"
    before = {name: (output / name).read_bytes() for name in images}
    missing.write_bytes(before["00001/samples/0001.png"][:-20])  # cut off, as a full disk leaves it
    (output / "00000/metadata.jsonl").unlink()
    drawn: list[str] = []
    draw = Sampler.image

    def counted(self: Sampler, *arguments: Any) -> torch.Tensor:
        drawn.append(arguments[3])
        return draw(self, *arguments)

    monkeypatch.setattr(Sampler, "image", counted)
    assert main(tiny_model("geneval", geneval, output)) == 0
    assert "8 images, 1 of them made now" in capsys.readouterr().out and drawn == ["00001 1"]
    assert {name: (output / name).read_bytes() for name in images} == before
    assert json.loads((output / "00000/metadata.jsonl").read_text(encoding="utf-8")) == LINES[0]
    page = (tmp_path / "made-run" / "report.html").read_text(encoding="utf-8")
    assert "All images are there" in page and "42, reset for every prompt" in page and CAPTIONS[1] in page
    assert "evaluate_images.py made --outfile" in page

    # The source's images of the same prompts, from other noise by nature, can be compared with them.
    source = tmp_path / "source"
    assert main(["evaluate", "geneval", str(geneval), str(source), "--model", "tiny-source", "--steps", "1"]) == 0
    assert main(["evaluate", "images", str(source), str(output), "--output", str(tmp_path / "kept.html")]) == 0
    assert CAPTIONS[1] in (tmp_path / "kept.html").read_text(encoding="utf-8")

    assert "made with steps 1, not 2" in mistake(capsys, *tiny_model("geneval", geneval, output, "--steps", "2"))
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(LINES[1]) + "\n", encoding="utf-8")
    assert "made with prompts" in mistake(capsys, *tiny_model("geneval", other, output))


def test_dpg_has_squares_of_four_and_nothing_else(
    dpg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "made"
    assert main(["evaluate", "dpg", str(dpg), str(output), "--model", "tiny-source", "--steps", "1"]) == 0
    assert files(output) == ["midjourney3.png", "partiprompts0.png"]
    assert files(tmp_path / "made-run") == [".lock", "report.html", "settings.json"]
    source = bundled.TinySource().images([CAPTIONS[0]] * 4, [42, 43, 44, 45], 1, 2.0)
    with Image.open(output / "partiprompts0.png") as image:
        assert image.size == (128, 128)
        for number, (left, top) in enumerate([(0, 0), (64, 0), (0, 64), (64, 64)]):
            part = np.asarray(image.crop((left, top, left + 64, top + 64))).astype(int)
            assert np.abs(part - np.asarray(picture(source[number])).astype(int)).max() <= 1
    capsys.readouterr()
    (output / "midjourney3.png").unlink()
    assert main(["evaluate", "dpg", str(dpg), str(output), "--model", "tiny-source", "--steps", "1"]) == 0
    assert "8 images, 4 of them made now" in capsys.readouterr().out
    assert "--resolution 64 --pic-num 4" in (tmp_path / "made-run" / "report.html").read_text(encoding="utf-8")


def test_hosts_make_them_and_what_they_lack_is_made_later(
    dpg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workflow, output = tmp_path / "workflow.json", tmp_path / "made"
    workflow.write_text(json.dumps(WORKFLOW), encoding="utf-8")

    def command(host: FakeHost) -> list[str]:
        words = ["--workflow", str(workflow), "--host", host.address, "--patience", "0.2"]
        return ["evaluate", "dpg", str(dpg), str(output), *words]

    with FakeHost(lambda number: "ok" if number <= 6 else "error") as host:
        assert main(command(host)) == 2
    assert len(files(output)) == 1, "a square was written before its four images were there"
    assert len(files(tmp_path / "made-run" / "single")) == 2
    assert "2 images are missing" in (tmp_path / "made-run" / "report.html").read_text(encoding="utf-8")
    with FakeHost() as host:
        assert main(command(host)) == 0
        assert {taken["2"]["inputs"]["seed"] for taken in host.taken} < {42, 43, 44, 45}
        assert len(host.taken) == 2
    assert files(output) == ["midjourney3.png", "partiprompts0.png"]
    assert files(tmp_path / "made-run" / "single") == []
    with Image.open(output / "partiprompts0.png") as image:  # the hosts' images tell their seeds
        colours = [image.getpixel(at) for at in ((0, 0), (8, 0), (0, 8), (8, 8))]
    assert colours == [(0, 0, seed) for seed in (42, 43, 44, 45)]


def test_a_kill_before_the_square_costs_no_image(dpg: Path, tmp_path: Path) -> None:
    output, single = tmp_path / "made", tmp_path / "made-run" / "single"
    command = ["evaluate", "dpg", str(dpg), str(output), "--model", "tiny-source", "--steps", "1"]
    assert main(command) == 0
    square = output / "partiprompts0.png"
    before = square.read_bytes()
    with Image.open(square) as image:
        single.mkdir(exist_ok=True)
        for number in range(4):
            left, top = number % 2 * 64, number // 2 * 64
            image.crop((left, top, left + 64, top + 64)).save(single / f"partiprompts0-{number}.png")
    square.unlink()
    assert main(command) == 0
    assert square.read_bytes() == before and files(single) == []


def test_settings_may_change_until_there_is_an_image(geneval: Path, tmp_path: Path) -> None:
    benchmark = BENCHMARKS["geneval"]
    wanted = shots(benchmark, benchmark.read(geneval), 42, own_seeds=True)
    for steps in (1, 2):
        made = GenEvalFolder(tmp_path / "made", benchmark, wanted, {"steps": steps})
    made.write(wanted[0], Image.new("RGB", (8, 8), "red"))
    with pytest.raises(ValueError, match="made with steps 2, not 3"):
        GenEvalFolder(tmp_path / "made", benchmark, wanted, {"steps": 3})
    with pytest.raises(ValueError, match="8 x 9 pixels, but GenEval is scored on squares"):
        made.write(wanted[1], Image.new("RGB", (8, 9)))


def test_mistakes_are_one_line(geneval: Path, dpg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "made"

    def said(kind: str, prompts: Path, *more: str) -> str:
        return mistake(capsys, "evaluate", kind, prompts, output, *more)

    assert "Give either the model as --model" in said("geneval", geneval)
    assert "needs a running ComfyUI" in said("geneval", geneval, "--workflow", "w.json")
    assert "--host goes with --workflow" in said("geneval", geneval, "--model", "tiny", "--host", "x:1")
    more = ("--workflow", "w.json", "--host", "x:1", "--steps", "3")
    assert "--steps goes with --model" in said("geneval", geneval, *more)
    assert "There is no file" in said("geneval", tmp_path / "no.jsonl", "--model", "tiny")
    assert "There is no file" in said("geneval", dpg, "--model", "tiny")
    assert "There is no folder" in said("dpg", geneval, "--model", "tiny")
    assert "no .txt files" in said("dpg", tmp_path, "--model", "tiny")
    wrong = tmp_path / "prompts.jsonl"
    wrong.write_text('{"prompt": "a fox"}\n', encoding="utf-8")
    assert "Line 1" in said("geneval", wrong, "--model", "tiny")
    wrong.write_text(json.dumps(LINES[0]) + '\n{"tag": "colors", "prompt": "a \\ud800 fox"}\n', encoding="utf-8")
    assert "Line 2" in said("geneval", wrong, "--model", "tiny")
    (dpg / "empty.txt").write_text(" \n", encoding="utf-8")
    assert "its prompt is missing" in said("dpg", dpg, "--model", "tiny")
    (dpg / "empty.txt").rename(dpg / "a.b.txt")
    assert "another dot" in said("dpg", dpg, "--model", "tiny")
    (dpg / "a.b.txt").rename(dpg / "c.txt")
    (dpg / "c.txt").write_text("a hippo", encoding="utf-8")
    assert "does not know the word 'hippo'" in said("dpg", dpg, "--model", "tiny")
    assert not output.exists()
    output.mkdir()
    (output / "notes.txt").write_text("x", encoding="utf-8")
    assert "holds other files" in said("geneval", geneval, "--model", "tiny", "--device", "cpu")
    assert not output.with_name(f"{output.name}-run").exists()


GENEVAL = [("single_object", [1, 1, 1, 0]), ("counting", [1, 0, 0, 0])]
DPG = (
    "made/partiprompts0.png, 1.0, 0.5, 0.6666666666666666, 1.0, 0.7916666666666666\n"
    "made/b, or not.png, 0.5, 0.5, 0.0, 1.0, 0.5\n"
    "Model: made\nL1 category scores:\n\trelation: 92.03125\n\tentity: 80.0\n\tother: 62.5\n"
    "L2 category scores:\n\tentity - part: 71.42857142857143\n\tentity - whole: 90.0\n\tother - text: 0.0\n"
    "\trelation - spatial: 92.03125\nImage path: made\nSave results to: made/r.txt\nDPG-Bench score: {score}\n"
)
"""A text as ELLA's compute_dpg_bench.py writes it, of --pic-num 4."""


def result(path: Path, tasks: list[tuple[str, list[int]]]) -> Path:
    """A file as GenEval's evaluate_images.py writes it: every column, slashes escaped as pandas does."""
    lines = [
        {
            **{"filename": f"made/pixel/00000/samples/{number:04}.png", "tag": tag, "prompt": "a photo of a café"},
            **{"correct": bool(right), "reason": "" if right else "expected bench>=1, found 0\nno target"},
            "metadata": json.dumps({"tag": tag, "include": [{"class": "bench", "count": 1}], "prompt": "a café"}),
            "details": json.dumps({"bench": [[1.5, 2.0, 300.25, 400.0, 0.97]]} if right else {}),
        }
        for tag, results in tasks
        for number, right in enumerate(results)
    ]
    text = "".join(json.dumps(line, separators=(",", ":")).replace("/", "\\/") + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def test_scores_stand_beside_the_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = result(tmp_path / "ours.jsonl", GENEVAL)
    theirs = result(tmp_path / "theirs.jsonl", [("counting", [1, 1, 0, 0]), ("single_object", [1, 1, 1, 1])])
    our_dpg, their_dpg = tmp_path / "ours.txt", tmp_path / "theirs.txt"
    our_dpg.write_text(DPG.format(score=62.5), encoding="utf-8")
    their_dpg.write_text(DPG.format(score=67.2), encoding="utf-8")
    table = tmp_path / "table.json"
    both = ["--source", str(their_dpg), str(theirs), "--json", str(table)]
    assert main(["evaluate", "scores", str(ours), str(our_dpg), *both]) == 0
    out = capsys.readouterr().out
    # GenEval's score is the mean over tasks, whatever their sizes: (.75 + .25) / 2 of (1 + .5) / 2.
    assert "GenEval: 0.5000, the source 0.7500; kept: 67%" in out
    assert "DPG-Bench: 0.6250, the source 0.6720; kept: 93%" in out
    rows = {(row["benchmark"], row["task"]): row for row in json.loads(table.read_text(encoding="utf-8"))}
    assert rows["GenEval", "counting"]["kept"] == 0.5 and rows["DPG-Bench", "entity"]["pixel"] == 0.8
    assert ("DPG-Bench", "entity - whole") not in rows and scores.read(our_dpg).images == 2
    assert main(["evaluate", "scores", str(ours)]) == 0
    assert "kept" not in capsys.readouterr().out
    results = ours.read_bytes()
    assert "already exists" in mistake(capsys, "evaluate", "scores", ours, "--json", ours)
    assert ours.read_bytes() == results, "the scorer took hours"
    assert "does not exist" in mistake(capsys, "evaluate", "scores", ours, "--json", tmp_path / "none" / "table.json")
    assert main(["evaluate", "scores", str(ours), "--json", str(table), "--overwrite"]) == 0


def test_other_files_are_no_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, text = result(tmp_path / "ours.jsonl", GENEVAL), tmp_path / "r.txt"

    def said(*words: object) -> str:
        return mistake(capsys, "evaluate", "scores", *words)

    assert "There is no file" in said(tmp_path / "nothing")
    text.write_text('{"question_id": 1, "answer": "yes"}\n', encoding="utf-8")
    assert "is not a result of GenEval's scorer" in said(text)
    text.write_text(DPG.format(score=50), encoding="utf-8")
    assert "is a result of GenEval, and there is none of GenEval from the source" in said(ours, "--source", text)
    assert "is a result of DPG-Bench, and there is none" in said(ours, "--source", ours, text)
    assert "both results of GenEval" in said(ours, ours)
    text.write_text(DPG.split("Model")[0], encoding="utf-8")
    assert "the scorer was stopped" in said(text)
    text.write_text(DPG.format(score=5000), encoding="utf-8")
    assert "not between 0 and 100" in said(text)
    ours.write_text(ours.read_text(encoding="utf-8") + '{"tag": 1}\n', encoding="utf-8")
    assert "Line 9" in said(ours)
