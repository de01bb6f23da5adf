"""A data folder in the making: killed at any write, it goes on and reads as any other."""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from comfyui_l2p.l2p_core.dataset import readers
from comfyui_l2p.l2p_core.dataset.synthesis import PlannedImage, SynthesisFolder, items
from comfyui_l2p.l2p_core.files import atomic

pytestmark = pytest.mark.usefixtures("unflushed")

SETTINGS: dict[str, str | int | float] = {"steps": 4, "cfg": 2.0, "model": "tiny"}
PROMPTS = ["a red fox, asleep", "雪中的狐狸", 'CON: "a hare"\nin two lines']


def image(item: PlannedImage) -> Image.Image:
    return Image.new("RGB", (8, 8), (item.seed % 256, 0, 0))


def make(folder: Path, wanted: list[PlannedImage], **settings: str | int | float) -> SynthesisFolder:
    """All images that are missing."""
    made = SynthesisFolder(folder, wanted, SETTINGS | settings)
    for item in made.todo:
        made.write(item, image(item))
    return made


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_items_follow_from_prompts_alone() -> None:
    two = items(PROMPTS, 2)
    assert [item.prompt for item in two] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert set(two) < set(items([*reversed(PROMPTS), "another"], 3))
    assert items(PROMPTS, 3)[2] == items(PROMPTS, 1, first=2)[0]
    assert len({item.seed for item in items([str(n) for n in range(500)], 4)}) == 2000
    assert all(0 <= item.seed < 2**48 for item in two)
    assert items([PROMPTS[0]] * 2, 1) == items([PROMPTS[0]], 1)


def test_names_are_safe_on_every_system() -> None:
    wanted = items([*PROMPTS, "../../etc", "C:\\x", "con", ".hidden", "x" * 5000, "A Red Fox, asleep"], 2)
    for item in wanted:
        assert len(item.name) < 80 and set(item.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")
        assert item.name.endswith(".png") and item.name.count(".") == 1
    assert len({item.name for item in wanted}) == len(wanted)


def test_it_reads_as_training_data(tmp_path: Path) -> None:
    wanted = items(PROMPTS, 2)
    make(tmp_path / "set", wanted)
    listing = readers.read(tmp_path / "set")
    assert not listing.problems
    assert {(sample.name, sample.caption, sample.seed) for sample in listing.samples} == {
        (item.name, item.prompt, item.seed) for item in wanted
    }
    first = rows(tmp_path / "set")[0]
    assert list(first) == ["image", "prompt", "seed", "steps", "cfg", "model"]
    assert (first["steps"], first["cfg"], first["model"]) == ("4", "2.0", "tiny")


def test_it_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    wanted = items(PROMPTS, 2)
    begun = SynthesisFolder(tmp_path, wanted, SETTINGS)
    for item in begun.todo[:3]:
        begun.write(item, image(item))
    assert begun.done == wanted[:3]
    again = SynthesisFolder(tmp_path, wanted, SETTINGS)
    assert (again.done, again.todo) == (wanted[:3], wanted[3:])
    more = items([*PROMPTS, "a new one"], 3)
    assert SynthesisFolder(tmp_path, more, SETTINGS).done == wanted[:3]


def test_images_of_other_prompts_stay(tmp_path: Path) -> None:
    make(tmp_path, items(PROMPTS[:1], 2))
    make(tmp_path, items(PROMPTS[1:2], 1))
    assert len(readers.read(tmp_path).samples) == len(rows(tmp_path)) == 3


def test_cut_missing_and_foreign_images_are_made_again(tmp_path: Path) -> None:
    wanted = items(PROMPTS, 2)
    made = make(tmp_path, wanted)
    cut, gone, whole = (made.path(item) for item in wanted[:3])
    cut.write_bytes(cut.read_bytes()[:-5])
    gone.unlink()
    again = SynthesisFolder(tmp_path, wanted, SETTINGS)
    assert again.todo == wanted[:2]
    assert [row["image"] for row in rows(tmp_path)] == [item.name for item in wanted[2:]]
    # A row lost between image and table comes back; an image of something else under that name does not.
    (tmp_path / "metadata.csv").unlink()
    Image.new("RGB", (8, 8)).save(whole)
    assert SynthesisFolder(tmp_path, wanted, SETTINGS).done == wanted[3:]
    assert len(rows(tmp_path)) == 3


@pytest.mark.parametrize("left", [1, 20, 60])
def test_a_row_cut_by_a_power_cut_is_written_anew(tmp_path: Path, left: int) -> None:
    wanted = items(PROMPTS, 1)
    make(tmp_path, wanted)
    table = tmp_path / "metadata.csv"
    content = table.read_bytes()
    table.write_bytes(content[:-left])
    assert SynthesisFolder(tmp_path, wanted, SETTINGS).done == wanted
    assert table.read_bytes() == content


def test_other_settings_are_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    wanted = items(PROMPTS, 1)
    make(tmp_path, wanted)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"made with cfg 2.0, not 3.0: use the same settings"):
        SynthesisFolder(tmp_path, wanted, SETTINGS | {"cfg": 3.0})
    with pytest.raises(ValueError, match="made by something else, so choose another name"):
        SynthesisFolder(tmp_path, wanted, {"steps": 4})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    link = tmp_path / "link"
    try:
        link.symlink_to(tmp_path / "gone", target_is_directory=True)
    except OSError:
        pytest.skip("links need rights on Windows")
    with pytest.raises(ValueError, match="a link that leads nowhere"):
        SynthesisFolder(link, [], SETTINGS)


def test_a_table_of_someone_elses_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a fox\n", encoding="utf-8")
    with pytest.raises(ValueError, match="another name"):
        SynthesisFolder(tmp_path, items(PROMPTS, 1), SETTINGS)
    assert (tmp_path / "metadata.csv").exists()


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("x" * 200_000, encoding="utf-8")
    with pytest.raises(ValueError, match=r"metadata.csv cannot be read \(field larger"):
        SynthesisFolder(tmp_path, items(PROMPTS, 1), SETTINGS)


def test_a_full_disk_leaves_the_table_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = items(PROMPTS, 1)
    made = SynthesisFolder(tmp_path, wanted, SETTINGS)
    made.write(wanted[0], image(wanted[0]))
    before = (tmp_path / "metadata.csv").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match="disk of .* is full"):
            made.write(wanted[1], image(wanted[1]))
        with pytest.raises(ValueError, match=r"metadata.csv could not be written: No space left"):
            atomic.append(tmp_path / "metadata.csv", b"half a row")
    assert (tmp_path / "metadata.csv").read_bytes() == before
    assert make(tmp_path, wanted).done == wanted


PROGRAM = """
import sys
from pathlib import Path
from PIL import Image
from comfyui_l2p.l2p_core.dataset.synthesis import SynthesisFolder, items
wanted = items([f"prompt {n}" for n in range(100)], 4)
made = SynthesisFolder(Path(sys.argv[1]), wanted, {"steps": 4})
print("ready", flush=True)
for item in made.todo:
    made.write(item, Image.effect_noise((64, 64), item.seed % 100))
"""


def test_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    wanted, rng = items([f"prompt {n}" for n in range(100)], 4), random.Random(0)
    done = 0
    for _ in range(4):
        with subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline()
            time.sleep(rng.uniform(0.01, 0.2))
            process.kill()
        if (tmp_path / "metadata.csv").exists():
            for row in rows(tmp_path):
                with Image.open(tmp_path / row["image"]) as found:
                    found.load()
        now = SynthesisFolder(tmp_path, wanted, {"steps": 4}).done
        assert len(now) >= done
        done = len(now)
    made = SynthesisFolder(tmp_path, wanted, {"steps": 4})
    for item in made.todo:
        made.write(item, image(item))
    # Windows spares what was written a moment ago.
    suffixes = {path.suffix for path in tmp_path.iterdir()} - ({".part"} if os.name == "nt" else set())
    assert not made.todo and suffixes == {".png", ".csv"}
    assert len(readers.read(tmp_path).samples) == len(rows(tmp_path)) == 400
