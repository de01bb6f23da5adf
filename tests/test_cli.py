"""The command line: every command on small files, and every mistake as one line and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints
import torch
from PIL import Image

from comfyui_l2p.l2p_core import checkpoint
from comfyui_l2p.l2p_core.checkpoint import load_tensors, save
from comfyui_l2p.train.cli import main

pytestmark = pytest.mark.usefixtures("unflushed")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_checkpoints.write(tiny_checkpoints.weights(), tmp_path / "source.safetensors")


@pytest.fixture
def pixel(tmp_path: Path, source: Path) -> Path:
    target = tmp_path / "pixel.safetensors"
    assert main(["convert", str(source), str(target), "--head-width", "0.125"]) == 0
    return target


@pytest.fixture
def trained(tmp_path: Path, pixel: Path) -> Path:
    """The pixel initialisation with two tensors changed, in a file of its own."""
    tensors, metadata = load_tensors(pixel)
    for name in ("x_embedder.weight", "local_decoder.out_conv.bias"):
        tensors[name] = tensors[name] + 1
    target = tmp_path / "trained.safetensors"
    save(tensors, target, metadata)
    return target


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command with a mistake ends in."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        code = int(str(stopped.code))
    assert code == 2
    printed = capsys.readouterr()
    # Progress bars end their lines with a carriage return.
    lines = [line for line in printed.err.replace("\r", "\n").splitlines() if line.startswith("l2p")]
    assert len(lines) == 1
    assert "Traceback" not in printed.err
    return lines[0]


@pytest.mark.parametrize(
    "command",
    [
        [], ["demo"], ["inspect"], ["convert"], ["synth"], ["cache"], ["train"], ["merge"], ["delta"], ["sample"],
        ["benchmark"], ["benchmark", "head"], ["benchmark", "checkpoint"], ["benchmark", "transfer"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert "usage: l2p" in capsys.readouterr().out


def test_help_needs_no_torch() -> None:
    program = (
        "import sys; from comfyui_l2p.train.cli import build_parser; build_parser(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_inspect_tells_what_a_file_is(pixel: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect", str(pixel)]) == 0
    text = capsys.readouterr().out
    assert "1k pixel model, comfy layout" in text
    assert "BF16" in text
    assert "l2p.kind = pixel-init" in text
    assert main(["inspect", str(source), "--json", "--keys"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "latent source"
    assert facts["config"]["dim"] == tiny_checkpoints.SOURCE.dim
    assert facts["keys"]["x_pad_token"] == ["BF16", [1, tiny_checkpoints.SOURCE.dim]]
    assert facts["parameters"] == sum(tensor.numel() for tensor in tiny_checkpoints.weights().values())


def test_delta_and_merge_give_the_trained_model_back(
    tmp_path: Path, source: Path, pixel: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "delta.safetensors"
    assert main(["delta", str(trained), str(pixel), str(small)]) == 0
    assert main(["inspect", str(small)]) == 0
    assert "delta" in capsys.readouterr().out
    merged = tmp_path / "merged.safetensors"
    assert main(["merge", str(small), str(pixel), str(merged)]) == 0
    assert tiny_checkpoints.same(load_tensors(merged)[0], load_tensors(trained)[0])
    # Most of the head is as it was initialised, which the source does not have.
    assert "another base" in mistake(capsys, "merge", small, source, tmp_path / "other.safetensors")


def test_sample_writes_any_size_and_never_over_a_file(
    tmp_path: Path, pixel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = tmp_path / "caption.safetensors"
    save({"positive": torch.randn(5, tiny_checkpoints.SOURCE.caption_dim)}, features)
    image = tmp_path / "image.png"
    command = ["sample", pixel, "--caption-features", features, "--cfg", 1, "--steps", 1, "--width", 50, "--height", 70]
    arguments = [*map(str, command), "--output", str(image)]
    assert main(arguments) == 0
    with Image.open(image) as picture:
        assert picture.size == (50, 70)
        assert json.loads(str(picture.info["l2p"]))["seed"] == 0
    assert "exists already" in mistake(capsys, *arguments)
    assert main([*arguments, "--overwrite", "--seed", "3", "4"]) == 0
    assert (tmp_path / "image-3.png").exists()
    assert (tmp_path / "image-4.png").exists()


def test_sample_explains_what_does_not_fit_before_it_reads_weights(
    tmp_path: Path, source: Path, pixel: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "read_weights", None)
    features = tmp_path / "caption.safetensors"
    save({"positive": torch.randn(5, 7)}, features)
    output = ["--output", tmp_path / "image.png"]
    assert "--caption-features" in mistake(capsys, "sample", pixel, "--prompt", "a cat", *output)
    assert "(tokens, 24)" in mistake(capsys, "sample", pixel, "--caption-features", features, *output)
    assert "one of the two" in mistake(capsys, "sample", pixel, *output)
    assert "convert it to L2P first" in mistake(capsys, "sample", source, "--prompt", "a cat", *output)


def test_mistakes_are_one_line(tmp_path: Path, source: Path, pixel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.safetensors"
    text.write_text("not a model, just some words about one", encoding="utf-8")
    target = tmp_path / "target.safetensors"
    assert "text file" in mistake(capsys, "inspect", text)
    assert "nothing.safetensors" in mistake(capsys, "inspect", tmp_path / "nothing.safetensors")
    assert "already" in mistake(capsys, "convert", pixel, target)
    assert "2k" in mistake(capsys, "convert", source, target, "--variant", "2k")
    assert "exists already" in mistake(capsys, "convert", source, pixel)
    assert "tiny" in mistake(capsys, "train", tmp_path / "no-such-recipe.toml")
    assert "--width" in mistake(capsys, "sample", pixel, "--width", "0")
    assert "see l2p --help" in mistake(capsys, "paint")
    assert not target.exists()


def test_interrupt_is_one_line(
    monkeypatch: pytest.MonkeyPatch, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("comfyui_l2p.train.inspect_file.open_checkpoint", interrupted)
    assert main(["inspect", str(source)]) == 130
    assert capsys.readouterr().err == "l2p: stopped.\n"


def test_debug_shows_where_a_mistake_arose(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        main(["--debug", "inspect", str(tmp_path / "nothing.safetensors")])


def run_cli(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "comfyui_l2p.train.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_path_in_other_letters_can_be_printed(tmp_path: Path, source: Path) -> None:
    """Into a pipe Windows writes its old code page, in which most letters are unknown."""
    named = source.rename(tmp_path / "модель.safetensors")
    with run_cli("inspect", named, env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}) as process:
        out, errors = process.communicate()
    assert process.returncode == 0, errors
    assert rb"\u043c" in out


def test_a_reader_that_has_seen_enough_is_no_mistake(source: Path) -> None:
    with run_cli("inspect", "--keys", source) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0 and not errors
