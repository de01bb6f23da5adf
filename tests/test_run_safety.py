"""What a user has trained outlives mistakes: a new run in its folder, a demo, a second process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from io import FileIO
from pathlib import Path

import pytest
from test_run import RECIPE, folder, train  # noqa: F401 (a fixture)

from comfyui_l2p.l2p_core import delta
from comfyui_l2p.l2p_core.checkpoint import CheckpointError, load_tensors, open_checkpoint, save
from comfyui_l2p.l2p_core.files import atomic, lock
from comfyui_l2p.l2p_core.run import memory_plan
from comfyui_l2p.l2p_core.run import recipe as recipes
from comfyui_l2p.l2p_core.run.folder import LOCK, RunFolder
from comfyui_l2p.l2p_core.run.metrics import read_metrics
from comfyui_l2p.train import demo
from comfyui_l2p.train.benchmark import gpu_report, hybrid, transfer, transfer_report
from comfyui_l2p.train.cli import main
from comfyui_l2p.train.own_folder import OwnFolder

pytestmark = pytest.mark.usefixtures("unflushed")

HOLDS = """
import sys
from pathlib import Path
from comfyui_l2p.l2p_core.run.folder import RunFolder
with RunFolder(Path(sys.argv[1])).held(print):
    print("held", flush=True)
    sys.stdin.read()
"""


def content(run: Path) -> dict[str, bytes]:
    """Everything in a run's folder but the lock and what may be made again at any time."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name not in (LOCK, "sizes.json")]
    return {str(path.relative_to(run)): path.read_bytes() for path in files if path.parent.name != "images"}


def restart(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:  # noqa: F811
    (folder / "new.toml").write_text(text, encoding="utf-8")
    code = main(["train", str(folder / "new.toml"), "--output", str(folder / "run"), "--restart"])
    return code, capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ((('base = "source.safetensors"', 'base = "sorce.safetensors"'),), "sorce.safetensors"),
        ((("head_width = 0.125", 'head_width = 0.125\ninit = "rnd"'),), "init must be one of random, scaled"),
        ((('kind = "renderings"\nimages = 4', 'kind = "folder"\npath = "my_imagse"'),), "my_imagse"),
        ((("blocks = 1", "blocks = 1\noptimiser_bits = 8\noffload = true"),), "bitsandbytes"),
        ((("a red circle", "a mauve circle"),), "mauve"),
        ((("", ""),), "There are"),
    ],
    ids=["base", "init", "data", "library", "prompt", "memory"],
)
def test_a_mistake_in_a_run_that_begins_anew_costs_nothing(
    folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    wrong: tuple[tuple[str, str], ...],
    expected: str,
) -> None:
    train(folder, "run", steps=2)
    before = content(folder / "run")
    text = RECIPE.format(steps=2, lr=1e-3)
    for old, new in wrong:
        text = text.replace(old, new)
    if expected == "There are":
        monkeypatch.setattr(memory_plan, "free_memory_and_swap", lambda: 1000)
    monkeypatch.setattr("comfyui_l2p.l2p_core.training.adamw.importlib.util.find_spec", lambda name: None)
    code, said = restart(folder, text, capsys)
    assert code == 2 and expected in said
    assert content(folder / "run") == before


def test_a_run_that_begins_anew_moves_the_old_one_aside(
    folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(folder, "run", steps=4)
    before = content(folder / "run")
    code = main(["train", str(folder / "recipe.toml"), "--output", str(folder / "run"), "--restart"])
    assert code == 0 and f"was moved to {folder / 'run' / 'earlier-1'}" in capsys.readouterr().err
    aside = folder / "run" / "earlier-1"
    assert content(aside) == before and len(read_metrics(RunFolder(folder / "run").metrics)) == 4
    delta.load_model(aside / "delta.safetensors", aside / "init.safetensors")
    # What lies there is a run as any other.
    (aside / "recipe.toml").write_text(
        (aside / "recipe.toml").read_text(encoding="utf-8").replace("steps = 4", "steps = 5"), encoding="utf-8"
    )
    assert main(["train", str(aside)]) == 0
    assert load_tensors(aside / "state.safetensors")[1]["l2p.step"] == "5"
    assert main(["train", str(folder / "recipe.toml"), "--output", str(folder / "run"), "--restart"]) == 0
    assert (folder / "run" / "earlier-2" / "state.safetensors").exists()


def test_a_delta_whose_state_was_deleted_makes_way_and_is_kept(folder: Path) -> None:  # noqa: F811
    """For room: the state is many times as large."""
    made = train(folder, "run", steps=2)
    kept = made.delta.read_bytes()
    made.state.unlink()
    train(folder, "run", steps=2)
    assert (made.path / "earlier-1" / "delta.safetensors").read_bytes() == kept


def test_what_cannot_be_moved_stays_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    made = train(folder, "run", steps=2)
    before, rename = content(made.path), os.rename

    def refused(path: Path, target: Path) -> None:
        if path.name == "recipe.toml" and target.parent != made.path:
            raise PermissionError(13, "Permission denied")
        rename(path, target)

    monkeypatch.setattr(os, "rename", refused)
    monkeypatch.setattr(atomic, "_PATIENCE", 0.0)
    with pytest.raises(CheckpointError, match="recipe.toml could not be moved"):
        train(folder, "run", steps=2, restart=True)
    assert content(made.path) == before


def test_a_demo_leaves_other_folders_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    train(folder, "run", steps=2)
    before = content(folder / "run")
    assert main(["demo", "--output", str(folder / "run")]) == 2
    assert "was not created by a demo" in capsys.readouterr().err
    assert content(folder / "run") == before


def test_a_demo_takes_a_demos_folder_again(tmp_path: Path) -> None:
    demo.FOLDER.check(tmp_path / "new")
    demo.FOLDER.check(tmp_path)
    (tmp_path / "state.safetensors").write_bytes(b"days of work")
    with pytest.raises(ValueError, match="was not created by a demo"):
        demo.demo(tmp_path)
    (tmp_path / demo.FOLDER.marker).write_text("", encoding="utf-8")
    demo.FOLDER.check(tmp_path)


def test_a_demos_folder_of_version_0_1_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    """It has no marker; steps and seed of that demo were its user's. Another recipe, or a run alone, is no demo."""
    kept = RunFolder(tmp_path).recipe
    text = recipes.to_toml(demo._recipe(steps=7, seed=3))
    (tmp_path / "state.safetensors").write_bytes(b"a demo's")
    for recipe, picture, is_demos in (
        (text, False, False),
        (text.replace("blocks = 2", "blocks = 1"), True, False),
        (text.replace('kind = "tiny"', 'kind = "renderings"'), True, False),
        ("no recipe", True, False),
        (text, True, True),
    ):
        kept.write_text(recipe, encoding="utf-8")
        (tmp_path / demo.PICTURE).unlink(missing_ok=True)
        if picture:
            (tmp_path / demo.PICTURE).write_bytes(b"a picture")
        if is_demos:
            demo.FOLDER.check(tmp_path)
            continue
        with pytest.raises(ValueError, match="was not created by a demo"):
            demo.FOLDER.check(tmp_path)


@pytest.mark.parametrize(
    ("command", "folder", "results", "made"),
    [
        ("transfer", transfer.FOLDER, transfer_report.RESULTS, "source/evaluation.safetensors"),
        ("hybrid", hybrid.FOLDER, hybrid.RESULTS, "shapes-0f-pixels-only--6-steps-96-0.json"),
        ("gpu", gpu_report.FOLDER, ("gpu.json", "gpu.md"), "gpu.md"),
    ],
)
def test_a_benchmark_replaces_only_results_of_its_own(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    folder: OwnFolder,  # noqa: F811
    results: tuple[str, ...],
    made: str,
) -> None:
    (tmp_path / "notes.txt").write_text("in nobody's way", encoding="utf-8")
    folder.check(tmp_path)
    for name in sorted(results, reverse=True):
        (tmp_path / name).write_text("a week of measuring", encoding="utf-8")
        assert main(["benchmark", command, "--output", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        first = min(path.name for path in tmp_path.iterdir() if path.name != "notes.txt")
        assert f"contains {first} and was not created by l2p benchmark {command}" in said and said.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", *results}
    assert {(tmp_path / name).read_text(encoding="utf-8") for name in results} == {"a week of measuring"}
    # A folder of a version that left no marker is used again, and so is one with it.
    (tmp_path / made).parent.mkdir(exist_ok=True)
    (tmp_path / made).write_text("`l2p benchmark gpu`, 2026-01-01", encoding="utf-8")
    folder.check(tmp_path)
    folder.mark(tmp_path)
    (tmp_path / made).write_text("", encoding="utf-8")
    folder.check(tmp_path)
    (tmp_path / made).unlink()
    (tmp_path / folder.marker).rename(tmp_path / "some.txt")
    (tmp_path / results[0]).write_text("of somebody", encoding="utf-8")
    with pytest.raises(ValueError, match=f"was not created by {folder.owner}"):
        folder.check(tmp_path)


def test_a_run_of_its_own_in_a_demos_folder_is_moved_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`l2p train` was told to write into the folder of an earlier demo."""
    monkeypatch.setattr(demo, "_demo", lambda *_: None)
    (tmp_path / demo.FOLDER.marker).write_text("", encoding="utf-8")
    run = RunFolder(tmp_path)
    run.begin(recipes.parse({"model": {"base": "mine"}}))
    run.state.write_bytes(b"days of work")
    demo.demo(tmp_path)
    assert (tmp_path / "earlier-1" / "state.safetensors").read_bytes() == b"days of work"
    run.state.write_bytes(b"a demo's")
    demo.demo(tmp_path)
    assert not run.state.exists() and not (tmp_path / "earlier-2").exists()


def test_an_initialisation_of_another_source_is_not_trained_on(
    folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that was killed before its first save begins with the source that the recipe names now; one that has saved
    is held to its own."""
    made = train(folder, "run", steps=2)
    tensors, about = load_tensors(folder / "source.safetensors")
    save({name: tensor * 1.01 for name, tensor in tensors.items()}, folder / "other.safetensors", about)
    arguments = ["train", str(folder / "recipe.toml"), "--output", str(folder / "run")]
    before = content(made.path)
    assert main([*arguments, "--base", str(folder / "other.safetensors")]) == 2
    assert "other content of [model] base" in capsys.readouterr().err
    assert content(made.path) == before
    for path in (made.state, made.delta):
        path.unlink()
    assert main([*arguments, "--base", str(folder / "other.safetensors")]) == 0
    trained_on = open_checkpoint(made.init).metadata["l2p.source_sha256"]
    assert trained_on == hashlib.sha256((folder / "other.safetensors").read_bytes()).hexdigest()
    # A base that was moved away is not needed again.
    (folder / "other.safetensors").unlink()
    assert main([*arguments, "--base", str(folder / "other.safetensors")]) == 0


@pytest.fixture
def holder(folder: Path) -> subprocess.Popen[str]:  # noqa: F811
    """Another process that has the run's folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline().strip() == "held"
    return process


def test_a_second_process_touches_nothing_until_the_first_is_gone(
    folder: Path,  # noqa: F811
    holder: subprocess.Popen[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with holder:
        (folder / "recipe.toml").write_text(RECIPE.format(steps=1, lr=1e-3), encoding="utf-8")
        arguments = ["train", str(folder / "recipe.toml"), "--output", str(folder / "run")]
        for more in ([], ["--restart"]):
            assert main([*arguments, *more]) == 2
            said = capsys.readouterr().err
            assert "is in use" in said and f"process {holder.pid} on " in said and said.count("\n") == 1
        assert [path.name for path in (folder / "run").iterdir()] == [LOCK]
        holder.kill()
    assert main(arguments) == 0 and RunFolder(folder / "run").delta.exists()


def test_a_refused_run_leaves_no_folder(
    folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = RECIPE.format(steps=2, lr=1e-3).replace('base = "source.safetensors"', 'base = "nowhere.safetensors"')
    (folder / "recipe.toml").write_text(text, encoding="utf-8")
    before = sorted(folder.rglob("*"))
    (folder / "empty").mkdir()
    for output in (folder / "runs" / "first", folder / "empty"):
        assert main(["train", str(folder / "recipe.toml"), "--output", str(output)]) == 2
        assert "nowhere.safetensors" in capsys.readouterr().err
        assert output.exists() == (output.name == "empty")
    (folder / "empty").rmdir()
    assert sorted(folder.rglob("*")) == before


def test_only_what_a_failed_holder_created_goes(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "one"
    for name in (None, "one/kept.txt", "other.txt"):
        with pytest.raises(RuntimeError, match="refused"), lock.held(path, LOCK, "trains", print):
            if name:
                (tmp_path / "runs" / name).write_text("kept", encoding="utf-8")
            raise RuntimeError("refused")
        assert (tmp_path / "runs").exists() == bool(name) and (path / LOCK).exists() == (path / "kept.txt").exists()
        shutil.rmtree(path, ignore_errors=True)
    (path / LOCK).parent.mkdir()
    (path / LOCK).write_text("process 1 on a machine\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="refused"), lock.held(path, LOCK, "trains", print):
        raise RuntimeError("refused")
    assert (path / LOCK).exists(), "another process may have it open"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not remove open files")
def test_a_lock_that_its_holder_removed_in_between_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process has opened the file; the holder, refused, removes it; a third one creates it again and holds it."""
    path, lock_file = tmp_path / "run", lock._lock
    third = contextlib.ExitStack()

    def late(file: FileIO) -> None:
        monkeypatch.setattr(lock, "_lock", lock_file)
        shutil.rmtree(path)
        third.enter_context(lock.held(path, LOCK, "trains", print))
        lock_file(file)

    monkeypatch.setattr(lock, "_lock", late)
    with (
        third,
        pytest.raises(lock.FolderInUse, match=f"process {os.getpid()} on "),
        lock.held(path, LOCK, "trains", print),
    ):
        raise AssertionError
    assert path.exists()


def test_where_locks_are_unknown_a_run_says_so(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unknown(_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock, "_lock", unknown)
    train(folder, "run", steps=1)
    assert "does not support locks" in capsys.readouterr().err


def test_fewer_steps_than_are_done_are_explained(
    folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = train(folder, "run", steps=3)
    before = made.state.read_bytes()
    train(folder, "run", steps=2)
    assert "3 steps are done already, and the recipe asks for 2: there is nothing left" in capsys.readouterr().err
    assert made.state.read_bytes() == before and len(read_metrics(made.metrics)) == 3
