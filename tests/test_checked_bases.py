"""A base that passed once is not hashed again while its files stay as they are, and only then."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny_checkpoints import HEAD_WIDTH, weights, write

from comfyui_l2p.l2p_core import delta
from comfyui_l2p.l2p_core.checkpoint import CheckpointError, load_tensors
from comfyui_l2p.l2p_core.convert import convert
from comfyui_l2p.l2p_core.deltas import checked_bases as verified
from comfyui_l2p.l2p_core.deltas.checked_bases import Verified
from comfyui_l2p.l2p_core.deltas.delta_on_base import Merged, open_merged, verify


class Scene:
    """A source long since written, and a delta on it."""

    def __init__(self, folder: Path):
        self.base = write(weights(), folder / "source.safetensors")
        initial = folder / "init.safetensors"
        convert(self.base, initial, head_width=HEAD_WIDTH)
        self.trained = {name: t + 1 for name, t in load_tensors(initial)[0].items() if name.startswith("local_decoder")}
        self.trained |= {name: t for name, t in load_tensors(initial)[0].items() if name.startswith("x_embedder")}
        self.delta = folder / "delta.safetensors"
        delta.save(self.trained, self.base, self.delta)
        self.age()
        self.remembered = Verified(folder / "user" / "verified.json")

    def age(self, seconds: float = 60) -> None:
        """Let the base's last change lie that far back."""
        stat = self.base.stat()
        os.utime(self.base, (stat.st_atime, stat.st_mtime - seconds))

    def merged(self) -> Merged:
        return open_merged(self.delta, self.base)


@pytest.fixture
def scene(tmp_path: Path, unflushed: None) -> Scene:
    return Scene(tmp_path)


def test_what_passed_is_known_at_the_next_start(scene: Scene) -> None:
    assert scene.merged() not in scene.remembered
    verify(scene.merged())
    scene.remembered.add(scene.merged())
    assert scene.merged() in Verified(scene.remembered.path)


def test_a_later_delta_on_the_same_base_needs_no_check(scene: Scene) -> None:
    scene.remembered.add(scene.merged())
    delta.save({name: t + 1 for name, t in scene.trained.items()}, scene.base, scene.delta, overwrite=True)
    assert scene.merged() in scene.remembered
    more = {**scene.trained, "layers.0.attention.out.weight": weights()["layers.0.attention.out.weight"]}
    delta.save(more, scene.base, scene.delta, overwrite=True)
    assert scene.merged() not in scene.remembered


def test_any_change_of_the_base_is_checked_again(scene: Scene) -> None:
    scene.remembered.add(scene.merged())
    content, stat = scene.base.read_bytes(), scene.base.stat()
    scene.age(1)
    assert scene.merged() not in scene.remembered
    if os.name == "posix":
        # Other numbers under the old time: what a tool that copies times leaves.
        scene.base.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(scene.base, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert scene.merged() not in scene.remembered
    moved = scene.base.rename(scene.base.with_name("moved.safetensors"))
    assert open_merged(scene.delta, moved) not in scene.remembered


def test_a_file_written_a_moment_ago_is_not_remembered(scene: Scene) -> None:
    os.utime(scene.base)
    scene.remembered.add(scene.merged())
    assert not scene.remembered.path.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xff", b"{}", b"[1, null]", b"7"])
def test_a_damaged_file_is_as_good_as_none(scene: Scene, content: bytes) -> None:
    scene.remembered.path.parent.mkdir()
    scene.remembered.path.write_bytes(content)
    assert scene.merged() not in scene.remembered
    scene.remembered.add(scene.merged())
    assert scene.merged() in scene.remembered


def test_the_file_stays_small(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "LIMIT", 3)
    scene.remembered.path.parent.mkdir()
    scene.remembered.path.write_text(json.dumps(["a", "b", "c"]), encoding="utf-8")
    for _ in range(2):
        scene.remembered.add(scene.merged())
    found = json.loads(scene.remembered.path.read_bytes())
    assert found[:2] == ["b", "c"] and len(found) == 3 and scene.merged() in scene.remembered


def test_a_place_that_cannot_be_written_has_its_sentence(scene: Scene) -> None:
    scene.remembered.path.parent.write_bytes(b"a file where the folder should be")
    with pytest.raises(CheckpointError, match="is a file, or a link that leads nowhere"):
        scene.remembered.add(scene.merged())


def test_checking_reports_its_progress_and_can_be_stopped(scene: Scene) -> None:
    seen: list[tuple[int, int]] = []
    verify(scene.merged(), lambda done, total: seen.append((done, total)))
    total = seen[-1][1]
    assert [done for done, _ in seen] == sorted({done for done, _ in seen}) and seen[-1] == (total, total)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(scene.merged(), stop)
