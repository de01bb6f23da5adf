"""A folder that a command fills is one process's: a second one is told so and touches nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

import pytest
from PIL import Image
from test_cli import mistake

from comfyui_l2p.l2p_core.files import lock
from comfyui_l2p.l2p_core.run.folder import LOCK as RUN_LOCK
from comfyui_l2p.train.cli import main

pytestmark = pytest.mark.usefixtures("unflushed")

HOLDS = """
import contextlib, sys
from pathlib import Path
from comfyui_l2p.l2p_core.files.lock import held
with contextlib.ExitStack() as stack:
    for path in map(Path, sys.argv[1:]):
        stack.enter_context(held(path.parent, path.name, "works", print))
    print("held", flush=True)
    sys.stdin.read()
"""
CAPTION = "a red circle in the centre on a white background"
RECIPE = """
[model]
base = "tiny"
head_width = 0.125

[data]
kind = "folder"
path = "images"
size = 64
"""
COMMANDS = {
    "synth": ["synth", "tiny", "set", "--prompts", "prompts.txt", "--seeds", "1", "--steps", "1"],
    "geneval": ["evaluate", "geneval", "geneval.jsonl", "geneval", "--model", "tiny-source", "--steps", "1"],
    "cache": ["cache", "recipe.toml", "--output", "run"],
    "depth": ["benchmark", "depth", "--quick", "--output", "depth"],
    "gpu": ["benchmark", "gpu", "--quick", "--output", "gpu", "--device", "cpu"],
    "hybrid": ["benchmark", "hybrid", "--output", "hybrid"],
    "transfer": ["benchmark", "transfer", "--output", "transfer"],
}
QUICK = ("synth", "geneval", "cache", "depth")
FOLDERS = {
    "synth": f"set/{lock.LOCK}",
    "geneval": f"geneval-run/{lock.LOCK}",
    "cache": f"run/{RUN_LOCK}",
    "depth": f"depth/quick/{lock.LOCK}",
    "gpu": f"gpu/{lock.LOCK}",
    "hybrid": f"hybrid/{lock.LOCK}",
    "transfer": f"transfer/{lock.LOCK}",
}
"""{name of a command: the lock that it takes}"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with everything that the commands take."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text(CAPTION, encoding="utf-8")
    line = {"tag": "colors", "include": [], "prompt": CAPTION}
    (tmp_path / "geneval.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one.txt").write_text(CAPTION, encoding="utf-8")
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "one.png")
    return tmp_path


@pytest.fixture
def holder(place: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folders of all commands."""
    locks = [str(place / path) for path in FOLDERS.values()]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, *locks], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None and process.stdout.readline().strip() == "held"
        yield process
        process.kill()


def content(folder: Path) -> dict[Path, bytes]:
    # On Windows the byte that is locked lies beyond the text, which others may read.
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_process_touches_nothing_until_the_first_is_killed(
    place: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(place)
    for command, path in FOLDERS.items():
        said = mistake(capsys, *COMMANDS[command])
        folder = Path(path).parent
        assert f"{folder} is in use: process {holder.pid} on " in said and "works there" in said
    assert content(place) == before
    holder.kill()
    holder.wait()
    for command in QUICK:
        assert main(COMMANDS[command]) == 0
    assert len(list((place / "set").glob("*.png"))) == 1 and len(list((place / "geneval").rglob("*.png"))) == 4


@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_that_cannot_be_written_or_created_is_named(
    place: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(FOLDERS[command]).parent
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file", encoding="utf-8")
    assert f"{folder} is a file" in mistake(capsys, *COMMANDS[command])
    folder.unlink()

    usual = os.open

    def read_only(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if path == os.devnull:
            return usual(path, flags, mode)
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)
    said = mistake(capsys, *COMMANDS[command])
    assert f"{folder} could not be written (Read-only file system): choose another folder" in said


@pytest.mark.parametrize(
    ("command", "does"),
    [
        ("synth", "generates images"),
        ("geneval", "generates images"),
        ("cache", "checks images"),
        ("depth", "runs l2p benchmark depth"),
    ],
)
def test_where_locks_are_unknown_a_command_says_so_and_works(
    place: Path, command: str, does: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(_: FileIO) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock, "_lock", unknown)
    assert main(COMMANDS[command]) == 0
    said = capsys.readouterr().err
    assert f"This disk does not support locks: make sure that no other process {does}" in said


def test_the_refusal_names_what_the_holder_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on Windows, where the file's position is at the locked byte after the attempt."""
    is_locked: Callable[[FileIO], None] = lock._lock

    def as_on_windows(file: FileIO) -> None:
        file.seek(1 << 30)
        is_locked(file)

    with lock.held(tmp_path, lock.LOCK, "generates images", print):
        monkeypatch.setattr(lock, "_lock", as_on_windows)
        with (
            pytest.raises(lock.FolderInUse, match=f"process {os.getpid()} on .* generates images there"),
            lock.held(tmp_path, lock.LOCK, "writes prompts", print),
        ):
            raise AssertionError
