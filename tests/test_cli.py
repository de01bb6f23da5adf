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
from comfyui_l2p.train.sample import size_like

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
        [], ["demo"], ["inspect"], ["convert"], ["doctor"], ["plan"], ["synth"], ["cache"], ["train"], ["merge"],
        ["delta"], ["sample"], ["benchmark"], ["benchmark", "head"], ["benchmark", "checkpoint"],
        ["benchmark", "transfer"], ["benchmark", "depth"], ["benchmark", "hybrid"],
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
    assert "already exists" in mistake(capsys, *arguments)
    assert main([*arguments, "--overwrite", "--seed", "3", "4"]) == 0
    assert (tmp_path / "image-3.png").exists()
    assert (tmp_path / "image-4.png").exists()


def test_an_image_to_start_from_keeps_its_orientation_and_aspect(tmp_path: Path) -> None:
    """A camera's picture: lying, with a note to turn it; red above once it is turned."""
    lying = Image.new("RGB", (96, 64), (0, 0, 255))
    lying.paste((255, 0, 0), (0, 0, 48, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    lying.save(tmp_path / "init.jpg", exif=exif, quality=95)
    target = tmp_path / "image.png"
    command = ["sample", "tiny", "--prompt", "a red circle in the centre on a white background", "--steps", "1"]
    command += ["--init", str(tmp_path / "init.jpg"), "--denoise", "0.01", "--cfg", "1", "--output", str(target)]
    assert main(command) == 0
    with Image.open(target) as image:
        assert image.size == (52, 78)  # 2 to 3, of about 64 x 64 pixels
        red, blue = image.convert("RGB").getpixel((26, 10)), image.convert("RGB").getpixel((26, 70))
    assert isinstance(red, tuple) and isinstance(blue, tuple)
    assert red[0] > 180 > 80 > red[2] and blue[2] > 180 > 80 > blue[0]
    assert main([*command, "--overwrite", "--height", "30"]) == 0
    with Image.open(target) as image:
        assert image.size == (20, 30)


@pytest.mark.parametrize(("shape", "given", "expected"), [
    ((4000, 3000), (None, None), (1184, 880)),
    ((3000, 4000), (None, None), (880, 1184)),
    ((3000, 4000), (600, None), (600, 800)),
    ((3000, 4000), (None, 600), (450, 600)),
    ((3000, 4000), (500, 500), (500, 500)),
    ((16_000, 100), (None, None), (12_960, 80)),
    ((100, 16_000), (None, None), (80, 12_960)),
    ((16_000, 50), (None, None), (18_318, 57)),  # multiples of 16 would cut a tenth off
    ((16_000, 10), (None, None), (40_960, 26)),
    ((60_000, 15), (None, None), (64_768, 16)),
], ids=str)  # fmt: skip
def test_sides_follow_the_image_that_is_started_from(
    shape: tuple[int, int], given: tuple[int | None, int | None], expected: tuple[int, int]
) -> None:
    assert size_like(shape, 1024, *given) == expected


def test_a_strip_keeps_its_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of about 64 x 64 pixels too, where the shorter side would round to nothing."""
    for shape in ((1600, 80), (80, 1600), (900, 20), (400, 31)):
        width, height = size_like(shape, 64, None, None)
        assert abs(width / height / (shape[0] / shape[1]) - 1) < 0.05 and min(width, height) >= 16
    for shape, given in (((20_000, 1), (None, None)), ((900, 3), (50, None)), ((900, 1), (None, 1024))):
        with pytest.raises(ValueError, match=r"--width and --height"):
            size_like(shape, 1024, *given)
    Image.new("RGB", (2000, 2)).save(tmp_path / "strip.png")
    command = ["sample", "tiny", "--prompt", "a red circle", "--init", tmp_path / "strip.png", "--height", 100]
    assert "The image to start from is 2000 x 2, which would make 100000 x 100 here" in mistake(capsys, *command)


def test_options_that_are_not_followed_to_the_letter_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "a red circle in the centre on a white background", "--steps", "1", "--cfg", "1"]
    files = [tmp_path / f"{number}.png" for number in range(2)]
    assert main(["sample", "tiny", *words, "--output", str(files[0])]) == 0
    assert "--negative" not in capsys.readouterr().err
    odd = ["--negative", "a blue square in the centre on a white background", "--tile", "3"]
    assert main(["sample", "tiny", *words, *odd, "--output", str(files[1])]) == 0
    said = capsys.readouterr().err
    assert "--negative has no effect with --cfg 1" in said and "Tiles of 3 pixels are raised to 64" in said
    assert files[0].read_bytes() != b"" and Image.open(files[0]).tobytes() == Image.open(files[1]).tobytes()
    assert main(["sample", "tiny", *words, *odd[:2], "--cfg", "2", "--output", str(tmp_path / "guided.png")]) == 0
    assert "--negative" not in capsys.readouterr().err


def test_the_beginning_of_an_options_name_is_not_that_option(capsys: pytest.CaptureFixture[str]) -> None:
    """`--caption TEXT` was read as the file of `--caption-features`."""
    with pytest.raises(SystemExit):
        main(["sample", "tiny", "--caption", "a red circle"])
    said = capsys.readouterr().err
    assert "l2p sample: unrecognized arguments: --caption" in said and "(see l2p sample --help)" in said


def test_sample_explains_what_does_not_fit_before_it_reads_weights(
    tmp_path: Path, source: Path, pixel: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "read_weights", None)
    features = tmp_path / "caption.safetensors"
    save({"positive": torch.randn(5, 7)}, features)
    output = ["--output", tmp_path / "image.png"]
    assert "--encoder" in mistake(capsys, "sample", pixel, "--prompt", "a cat", *output)
    assert "does not exist" in mistake(capsys, "sample", pixel, "--prompt", "a cat", "--encoder", "none", *output)
    assert "--negative goes with --prompt" in mistake(
        capsys, "sample", pixel, "--caption-features", features, "--negative", "blurred", *output
    )
    assert "(tokens, 24)" in mistake(capsys, "sample", pixel, "--caption-features", features, *output)
    assert "either as --prompt or as" in mistake(capsys, "sample", pixel, *output)
    assert "RAM" in mistake(capsys, "sample", "tiny", "--prompt", "a red circle", "--width", 65_536, "--height", 65_536)
    assert "--init" in mistake(capsys, "sample", "tiny", "--prompt", "a red circle", "--denoise", 0.5)
    for name in ("a.jpg", "a.webp", "a"):
        assert "end it in .png" in mistake(
            capsys, "sample", "tiny", "--prompt", "a red circle", "--output", tmp_path / name
        )
        assert not (tmp_path / name).exists()
    assert "cannot be used as an image" in mistake(
        capsys, "sample", "tiny", "--prompt", "a red circle", "--init", features, *output
    )
    assert "convert it to L2P first" in mistake(capsys, "sample", source, "--prompt", "a cat", *output)


@pytest.mark.parametrize("command", ["convert", "merge", "delta"])
@pytest.mark.parametrize("name", ["model.ckpt", "model", "model.safetensors.bak", "v1.5"])
def test_a_model_is_not_written_under_another_kind_of_name(
    tmp_path: Path, command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before the other files are opened: they are not there."""
    sources = [tmp_path / f"{number}.safetensors" for number in range(1 if command == "convert" else 2)]
    said = mistake(capsys, command, *sources, tmp_path / name)
    assert said.count(name) == 1 and "end the name in .safetensors" in said and not list(tmp_path.iterdir())


def test_mistakes_are_one_line(tmp_path: Path, source: Path, pixel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.safetensors"
    text.write_text("not a model, just some words about one", encoding="utf-8")
    target = tmp_path / "target.safetensors"
    assert "text file" in mistake(capsys, "inspect", text)
    assert "nothing.safetensors" in mistake(capsys, "inspect", tmp_path / "nothing.safetensors")
    assert "already" in mistake(capsys, "convert", pixel, target)
    assert "2k" in mistake(capsys, "convert", source, target, "--variant", "2k")
    assert "already exists" in mistake(capsys, "convert", source, pixel)
    assert "tiny" in mistake(capsys, "train", tmp_path / "no-such-recipe.toml")
    assert "--width" in mistake(capsys, "sample", pixel, "--width", "0")
    assert "see l2p --help" in mistake(capsys, "paint")
    assert not target.exists()


def test_each_bad_image_has_its_own_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.psd").write_bytes(b"8BPS")
        (tmp_path / f"{name}.txt").write_text("a red circle", encoding="utf-8")
    Image.new("RGB", (64, 64)).save(tmp_path / "c.png")
    (tmp_path / "c.txt").write_text("a red circle", encoding="utf-8")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[model]\nbase = "tiny"\n[data]\nkind = "folder"\npath = "."\nsize = 64\n', encoding="utf-8")
    assert main(["train", str(recipe), "--output", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()[-3:]
    assert "2 of 3 samples are bad" in lines[0]
    assert [line.strip().partition(":")[0] for line in lines[1:]] == ["a.psd", "b.psd"]


def test_debug_shows_where_a_mistake_arose(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        main(["--debug", "inspect", str(tmp_path / "nothing.safetensors")])


def test_a_path_in_other_letters_can_be_printed(tmp_path: Path, source: Path) -> None:
    """Into a pipe Windows writes its old code page, in which most letters are unknown."""
    named = source.rename(tmp_path / "модель.safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "comfyui_l2p.train", "inspect", str(named)],
        env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert rb"\u043c" in done.stdout


@pytest.mark.filterwarnings("error:.*device type")  # torch's of mkldnn, which would stand beside the sentence
@pytest.mark.parametrize("name", ["cuda:99", "cuda:-1", "foo", "", "mps:3", "meta", "xpu:7", "hip", "cuda:x", "mkldnn"])
@pytest.mark.parametrize("command", [
    ["train", "tiny"], ["cache", "tiny"], ["sample", "tiny", "--prompt", "a red circle"], ["benchmark", "train"],
    ["benchmark", "gpu"],
], ids=" ".join)  # fmt: skip
def test_a_device_that_is_not_there_is_named_with_those_that_are(
    command: list[str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = mistake(capsys, *command, f"--device={name}")
    assert f"no device {name!r}" in said and "it has cpu" in said
    assert not list(tmp_path.iterdir())


def test_memory_that_runs_out_in_sampling_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("comfyui_l2p.l2p_core.flow.integrate", full)
    command = ["sample", "tiny", "--prompt", "a red circle", "--output", str(tmp_path / "a.png")]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "RAM ran out while sampling 64 x 64 pixels" in said and "--weights fp8, --tile 64" in said
    assert "Tried to allocate" not in said and not list(tmp_path.iterdir())
