"""What a run folder is held to, and when it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from comfyui_l2p.l2p_core.run import recipe as recipes
from comfyui_l2p.l2p_core.run.folder import RunFolder

FIRST = recipes.parse({"model": {"base": "a"}, "training": {"blocks": 1}})
OTHER = recipes.parse({"model": {"base": "a"}, "training": {"blocks": 2}})


def test_a_run_that_has_saved_nothing_gives_way(tmp_path: Path) -> None:
    """So that a mistake found in preparation is put right without another word."""
    run = RunFolder(tmp_path / "run")
    run.begin(FIRST)
    run.identify({"base": "1", "data": "1"})
    run.init.write_bytes(b"of another base")
    run.begin(OTHER)
    assert recipes.load(run.recipe) == OTHER and not run.init.exists()
    run.identify({"base": "2", "data": "2"})


def test_a_run_that_has_saved_is_held_to(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.begin(FIRST)
    run.identify({"base": "1", "data": "1"})
    run.state.write_bytes(b"saved")
    with pytest.raises(ValueError, match="holds a run with .training. blocks = 1, but the recipe says 2"):
        run.begin(OTHER)
    with pytest.raises(ValueError, match="other content of .data. path"):
        run.identify({"base": "1", "data": "2"})
    run.begin(FIRST)
    assert run.state.exists()


def test_files_of_somebody_else_are_moved_aside_whole(tmp_path: Path) -> None:
    """A folder that was meant for something else: no file in it is deleted or overwritten."""
    for anew in (True, False):
        run = RunFolder(tmp_path / str(anew))
        run.events.mkdir(parents=True)
        own = [run.events / "talk.txt", run.report, run.plan, run.montage(7), run.card, run.metrics, run.init]
        for path in own:
            path.write_text(path.name, encoding="utf-8")
        other = run.path / "montage-holiday.png"
        other.write_text("mine", encoding="utf-8")
        assert not run.continues(FIRST)
        aside = run.begin(FIRST, anew)
        assert aside is not None
        assert all((aside / path.relative_to(run.path)).read_text() == path.name for path in own)
        assert other.read_text() == "mine" and run.montages() == []


def test_a_begun_run_that_gives_way_leaves_what_it_did_not_make(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.begin(FIRST)
    run.events.mkdir()
    for name in ("events.out.tfevents.1", "talk.txt"):
        (run.events / name).write_text(name, encoding="utf-8")
    run.begin(OTHER)
    assert [path.name for path in run.events.iterdir()] == ["talk.txt"]


WRITTEN = '# tuned by hand\n[model]\nbase = "a"\n\n[training]\nblocks = 1\n'


def test_a_recipe_that_its_user_wrote_in_the_folder_stays(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.recipe.write_text(WRITTEN, encoding="utf-8")
    same = recipes.with_paths(FIRST, run.path)
    assert run.begin(same) is None and run.recipe.read_text(encoding="utf-8") == WRITTEN
    run.identify({"base": "1", "data": "1"})
    run.init.write_bytes(b"of this run")
    assert run.begin(same) is None and run.init.exists(), "the run that has begun continues"
    run.state.write_bytes(b"saved")
    aside = run.begin(same, anew=True)
    assert aside and run.recipe.read_text(encoding="utf-8") == WRITTEN
    assert recipes.load(aside / "recipe.toml") == same, "its relative paths are those of the folder above"
    assert run.begin(OTHER) is None and recipes.load(run.recipe) == OTHER
    assert (run.path / "recipe-1.toml").read_text(encoding="utf-8") == WRITTEN


def test_a_recipe_of_an_earlier_version_is_one_that_a_run_wrote(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.begin(FIRST)
    lines = run.recipe.read_text(encoding="utf-8").splitlines()
    run.recipe.write_text("\n".join(line for line in lines if not line.startswith("pairs")), encoding="utf-8")
    run.init.write_bytes(b"of that run")
    assert run.begin(OTHER) is None and not run.init.exists()
