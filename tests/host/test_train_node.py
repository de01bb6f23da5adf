"""Train L2P on a running server: it trains, stops, goes on, and says what is wrong."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import data_folders
import golden_vectors as golden
import graphs
import pytest
import torch
from host_server import Host, Refused, Run, Server
from safetensors.torch import save_file
from test_server import picture, sentence

from comfyui_l2p.l2p_core import tiny
from comfyui_l2p.l2p_core.checkpoint import load_tensors
from comfyui_l2p.l2p_core.run.folder import RunFolder
from comfyui_l2p.l2p_core.run.metrics import read_metrics


@pytest.fixture(scope="module", autouse=True)
def shapes(server: Server) -> Path:
    """A data set of clean tiny images."""
    folder = server.base / "datasets" / "shapes"
    return data_folders.tiny_set(folder, 6)


@pytest.fixture
def models(server: Server) -> Path:
    return server.base / "models" / "diffusion_models"


def run_folder(server: Server, name: str) -> RunFolder:
    return RunFolder(server.base / "output" / "l2p_runs" / name)


def trained(run: Run) -> bool:
    """Whether a step or more of a long run has been reported."""
    return any(node == "2" and total == 500 and value >= 2 for node, value, total in run.progress)


def refusal(server: Server, graph: dict[str, Any]) -> str:
    """What the user reads at once, or when the node has run."""
    try:
        return sentence(server.run(graph))
    except Refused as refused:
        return refused.sentences()


def test_it_trains_and_its_delta_is_loaded_and_sampled_from(server: Server, models: Path) -> None:
    """With the loss graph and the montage wired, after the same server has sampled."""
    assert server.run(graphs.demo(steps=1)).error is None
    graph = graphs.train("first/run")
    load = {"file": graphs.TINY, "delta": ["2", 0], "weight_dtype": "default", "head_tile": "auto"}
    sampling = graphs.demo(model=["5", 0], steps=2)
    graph |= {"5": {"class_type": "L2PLoader", "inputs": load}, "12": sampling["2"], "13": sampling["3"]}
    graph["14"] = sampling["4"] | {"inputs": sampling["4"]["inputs"] | {"positive": ["12", 0], "negative": ["13", 0]}}
    graph["15"] = {"class_type": "SaveImage", "inputs": {"images": ["14", 0], "filename_prefix": "trained"}}
    run = server.run(graph)
    assert picture(server, run, "15").shape == (64, 64, 3)
    assert ("2", 3, 3) in run.progress
    assert picture(server, run, "4").std() > 0, "the host's loss graph is empty"
    folder = run_folder(server, "first/run")
    assert picture(server, run, "3").shape[:2] == (128, 128 * 2 + 4)
    assert folder.report.is_file() and (models / "first" / "run.safetensors").read_bytes() == folder.delta.read_bytes()
    assert [line["step"] for line in read_metrics(folder.metrics)] == [1, 2, 3]
    card = (models / "first" / "run.md").read_text(encoding="utf-8")
    assert "Trained for 3 of 3 steps" in card and "![Montage of step 3](<run-montage.png>)" in card
    assert (models / "first" / "run-montage.png").is_file() and str(server.base) not in card
    assert "sampled from the source" in folder.report.read_text(encoding="utf-8")
    (live,) = run.outputs["2"]["l2p_training"]
    assert live["status"] == "finished" and live["curves"]["steps"] == [1, 2, 3]
    assert live["notes"] and not any("How long" in note or "remaining" in note for note in live["notes"])
    assert live in server.get("/l2p/training")
    file = live["montage"]
    assert server.get(f"/view?filename={file['filename']}&subfolder={file['subfolder']}&type=output")[:4] == b"\x89PNG"
    report = server.get("/l2p/report?run=first/run")
    assert report.startswith(b"<!doctype html>") and b"width=device-width" in report
    # A run that is refused leaves the curves; and a server that knows nothing of a run reads them from its folder.
    refused = server.run(graphs.train("first/run", policy="all"))
    shown = server.get("/l2p/training?run=first/run")
    assert str(server.base) not in sentence(refused) and "output/l2p_runs/first/run holds a run" in sentence(refused)
    assert shown["status"] == "failed" and shown["curves"] == live["curves"] and shown["montage"] == file
    shutil.copytree(folder.path, run_folder(server, "copied").path)
    saved = server.get("/l2p/training?run=copied")
    assert saved["curves"] == live["curves"] and saved["text"] == "Finished after 3 steps"
    # What is finished is not trained again, nor refused for the delta that it has laid there itself.
    again = server.run(graphs.train("first/run", montage_every=7))
    assert again.error is None and len(read_metrics(folder.metrics)) == 3


def test_it_runs_again_where_its_data_or_its_delta_is_not_as_it_was(server: Server, models: Path) -> None:
    folder = data_folders.tiny_set(server.base / "datasets" / "changing", 4)
    graph = graphs.train("data that changes", dataset="changing")
    assert server.run(graph).error is None
    assert "2" not in server.run(graph).ran
    (models / "data that changes.safetensors").unlink()
    assert "2" in server.run(graph).ran and (models / "data that changes.safetensors").is_file()
    assert "2" not in server.run(graph).ran
    data_folders.tiny_set(folder / "more", 2)
    assert "other content of [data] path" in sentence(server.run(graph))
    shutil.rmtree(folder / "more")
    assert server.run(graph).error is None
    shutil.rmtree(run_folder(server, "data that changes").path)
    assert "already exists" in sentence(server.run(graph)), "a delta of a run that is gone is not replaced unasked"


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_the_folder_of_runs_and_data_sets_may_lie_on_another_disk(host: Host, tmp_path: Path) -> None:
    for link in ("output/l2p_runs", "datasets/linked"):
        (tmp_path / "disk" / link).mkdir(parents=True)
        (tmp_path / link).parent.mkdir(parents=True)
        (tmp_path / link).symlink_to(tmp_path / "disk" / link)
    data_folders.tiny_set(tmp_path / "disk" / "datasets" / "linked" / "set", 4)
    with Server(host, tmp_path) as server:
        run = server.run(graphs.train("deep/run", dataset="linked/set", montage_every=1))
        assert run.error is None, run.error
        assert picture(server, run, "3").shape[:2] == (128, 128 * 2 + 4)
        (live,) = run.outputs["2"]["l2p_training"]
        file = live["montage"]
        shown = server.get(f"/view?filename={file['filename']}&subfolder={file['subfolder']}&type=output")
        assert file["subfolder"] == "l2p_runs/deep/run" and shown[:4] == b"\x89PNG"
    assert (tmp_path / "disk" / "output" / "l2p_runs" / "deep" / "run" / "delta.safetensors").is_file()


def test_interrupting_saves_and_going_on_is_exact(server: Server) -> None:
    stopped = server.run(graphs.train("stopped", steps=500), interrupt_when=trained)
    folder = run_folder(server, "stopped")
    done = int(load_tensors(folder.state)[1]["l2p.step"])
    assert stopped.interrupted and 2 <= done < 500
    assert server.get("/l2p/training")[-1]["status"] == "stopped"
    assert server.run(graphs.train("stopped", steps=done + 2)).error is None
    assert server.run(graphs.train("unstopped", steps=done + 2)).error is None
    gone_on, whole = (load_tensors(run_folder(server, name).state)[0] for name in ("stopped", "unstopped"))
    assert gone_on.keys() == whole.keys() and all(torch.equal(gone_on[name], whole[name]) for name in whole)
    assert "[training] blocks = 1" in sentence(server.run(graphs.train("stopped", steps=done + 2, blocks=2)))
    assert server.run(graphs.train("stopped", steps=2, blocks=2, start="begin anew", overwrite=True)).error is None


def test_a_montage_can_be_interrupted_and_is_made_up_for(server: Server) -> None:
    """The montage of step 2, which is not one for saving, has as many sampling steps as a recipe may ask for."""
    settings = {"steps": 3, "montage_every": 2, "save_every": 100}

    def changes(sampling_steps: int) -> str:
        return f"[training]\nwarmup_steps = 0\n[watch]\nsteps = {sampling_steps}\n"

    def in_montage(_: Run) -> bool:
        # The list may hold runs of earlier tests.
        return bool(runs := server.get("/l2p/training")) and runs[-1]["text"].startswith("Montage")

    graph = graphs.train("montage", **settings, changes=changes(10_000))
    assert server.run(graph, interrupt_when=in_montage).interrupted
    folder = run_folder(server, "montage")
    assert load_tensors(folder.state)[1]["l2p.step"] == "2" and not folder.montages()
    assert server.run(graphs.train("montage", **settings, changes=changes(1))).error is None
    assert [path.name for path in folder.montages()] == ["montage-000002.png", "montage-000003.png"]


def test_preparation_can_be_interrupted(server: Server) -> None:
    run = server.run(graphs.train("early"), interrupt_when=lambda run: any(node == "2" for node, *_ in run.progress))
    assert run.interrupted or run.error is None
    assert server.run(graphs.train("early", steps=2)).error is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dataset": "missing"}, "There is no data set 'missing'"),
        ({"dataset": "../output"}, "leads out of the datasets folder"),
        ({"dataset": "bare"}, "caption"),
        ({"run_name": "../outside"}, "leads out of output/l2p_runs"),
        ({"run_name": " "}, "The run has no name"),
        ({"run_name": "captions"}, "holds caption features"),
        ({"filename": "../outside"}, "leads out of models/diffusion_models"),
        ({"filename": "taken"}, "already exists"),
        ({"model": "broken.safetensors"}, "broken.safetensors"),
        ({"model": "wide.safetensors"}, "use the text encoder that it was trained with"),
        ({"changes": "[training]\nwarmup_step = 1"}, "did you mean 'warmup_steps'?"),
        ({"changes": '[data]\npath = "/"'}, "[data] path may not be changed here"),
        ({"prompts": "a purple elephant"}, "elephant"),
        ({"learning_rate": 1.0, "changes": "[training]\nlr = -1"}, "lr must be above 0"),
    ],
)
def test_mistakes_end_in_a_sentence(server: Server, models: Path, changes: dict[str, Any], expected: str) -> None:
    data_folders.grey(server.base / "datasets" / "bare" / "0.png", 3)
    (models / "broken.safetensors").write_bytes(b"no model")
    (models / "taken.safetensors").write_bytes(tiny.DELTA_PATH.read_bytes())
    save_file(golden.diffusers_weights(), models / "wide.safetensors")
    assert expected in refusal(server, graphs.train(**{"run_name": "mistaken", **changes}))
    assert (models / "taken.safetensors").read_bytes() == tiny.DELTA_PATH.read_bytes()
    assert not (server.base / "output" / "outside").exists()


def test_the_server_is_well_after_mistakes(server: Server) -> None:
    assert picture(server, server.run(graphs.demo(steps=2, seed=11)), "5").any()
