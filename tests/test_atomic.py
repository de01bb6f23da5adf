"""Files that appear whole or not at all, and what killed processes leave beside them."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from io import FileIO
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from comfyui_l2p.l2p_core.files.atomic import atomic_file, remove, remove_leftovers, write_bytes
from comfyui_l2p.l2p_core.files.safetensors_header import CheckpointError

WRITER = """
import sys
from pathlib import Path
from comfyui_l2p.l2p_core.files.atomic import atomic_file
with atomic_file(Path(sys.argv[1]), 100, overwrite=True) as file:
    file.write(b"half of it")
    print("writing", flush=True)
    sys.stdin.read()
"""


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.part"))


def test_parts_of_the_killed_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    target = tmp_path / "state.safetensors"
    write_bytes(target, b"first")
    write_bytes(tmp_path / "state.safetensors.notes.part", b"the user's own")
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"writing"
        write_bytes(target, b"second")
        assert len(parts(tmp_path)) == 2, "the part of a living process was taken away"
        process.kill()
    for part in parts(tmp_path):
        os.utime(part, (0, 0))  # Windows spares what was written a moment ago
    assert len(parts(tmp_path)) == 2
    write_bytes(tmp_path / "other", b"third")
    assert len(parts(tmp_path)) == 2, "the part of another target was taken away"
    write_bytes(target, b"fourth")
    assert [path.name for path in parts(tmp_path)] == ["state.safetensors.notes.part"]
    assert target.read_bytes() == b"fourth"


def test_a_part_taken_for_a_leftover_before_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    taken: list[Path] = []

    def slow_to_lock(file: object) -> None:
        if not taken:
            taken.extend(parts(tmp_path))
            taken[0].unlink()

    monkeypatch.setattr("comfyui_l2p.l2p_core.files.atomic._lock", slow_to_lock)
    write_bytes(target, b"content")
    assert taken and target.read_bytes() == b"content" and not parts(tmp_path)


def test_a_part_that_is_about_to_be_removed_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "win32":
        pytest.skip("Windows removes no file that is open")
    import fcntl

    held: list[FileIO] = []

    def taken_first(file: FileIO) -> None:
        if not held:
            held.append(open(parts(tmp_path)[0], "r+b", buffering=0))  # noqa: SIM115 (closed below)
            fcntl.flock(held[0], fcntl.LOCK_EX)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    monkeypatch.setattr("comfyui_l2p.l2p_core.files.atomic._lock", taken_first)
    write_bytes(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert len(parts(tmp_path)) == 1, "the part of another was put in place"
    held[0].close()


def test_a_part_is_no_leftover_until_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may clear up between the last byte and the rename."""
    target, replace = tmp_path / "file", os.replace

    def cleared_first(part: Path, target: Path) -> None:
        remove_leftovers(target)
        replace(part, target)

    monkeypatch.setattr(os, "replace", cleared_first)
    write_bytes(target, b"content")
    assert target.read_bytes() == b"content" and not parts(tmp_path)


def test_leftovers_stay_where_locks_are_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / "file.0123abcd.part"
    left.write_bytes(b"?")
    os.utime(left, (0, 0))

    def unknown(file: object) -> None:
        raise OSError(95, "Operation not supported")

    if os.name == "posix":
        monkeypatch.setattr("comfyui_l2p.l2p_core.files.atomic._lock", unknown)
        remove_leftovers(tmp_path / "file")
        assert left.exists()
        write_bytes(tmp_path / "file", b"content")
        assert (tmp_path / "file").read_bytes() == b"content"
        monkeypatch.undo()
    remove_leftovers(tmp_path / "file")
    assert not left.exists()


@pytest.mark.skipif(os.name == "posix", reason="only Windows keeps what is read from being replaced")
def test_a_file_that_is_read_is_replaced_when_it_is_free(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_bytes(target, b"old")
    reader = target.open("rb")
    threading.Timer(0.5, reader.close).start()
    write_bytes(target, b"new")
    assert target.read_bytes() == b"new" and not parts(tmp_path)


@pytest.mark.skipif(os.name == "posix", reason="only Windows keeps what is read from being replaced")
def test_a_file_that_stays_open_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comfyui_l2p.l2p_core.files.atomic._PATIENCE", 0.2)
    target = tmp_path / "file"
    write_bytes(target, b"old")
    with target.open("rb"), pytest.raises(CheckpointError, match="another program has it open"):
        write_bytes(target, b"new")
    assert target.read_bytes() == b"old" and not parts(tmp_path)


@pytest.mark.skipif(os.name == "posix", reason="only Windows keeps what is read from being removed")
def test_a_file_that_is_read_is_removed_when_it_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    reader = target.open("rb")
    threading.Timer(0.5, reader.close).start()
    remove(target)
    remove(target)
    assert not target.exists()
    target.write_bytes(b"new")
    monkeypatch.setattr("comfyui_l2p.l2p_core.files.atomic._PATIENCE", 0.2)
    with target.open("rb"), pytest.raises(CheckpointError, match="could not be removed: another program has it open"):
        remove(target)
    assert target.read_bytes() == b"new"


@pytest.mark.skipif(os.name == "posix", reason="only Windows keeps what is read from being replaced")
def test_a_file_that_is_mapped_makes_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ComfyUI maps the models that it has loaded."""
    monkeypatch.setattr("comfyui_l2p.l2p_core.files.atomic._PATIENCE", 0.2)
    monkeypatch.setattr("comfyui_l2p.l2p_core.files.atomic._MOMENT", -1.0)
    target = tmp_path / "file.safetensors"
    save_file({"x": torch.zeros(1000)}, target)
    with safe_open(target, framework="pt") as file:
        loaded = file.get_tensor("x")
    write_bytes(target, b"new")
    assert target.read_bytes() == b"new" and not bool(loaded.any())
    del file, loaded
    gc.collect()
    write_bytes(target, b"newer")
    assert target.read_bytes() == b"newer" and not parts(tmp_path)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_bytes(target, b"old")
    with pytest.raises(CheckpointError, match="disk of .* is full"), atomic_file(target, 3, overwrite=True) as file:
        file.write(b"n")
        raise OSError(28, "No space left on device")
    assert target.read_bytes() == b"old" and not parts(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        write_bytes(tmp_path / "nowhere" / "file", b"")
