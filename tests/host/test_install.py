"""The pack installed as from the registry: the published files under the project's name, and its requirements."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import graphs
import pytest
from host_server import ROOT, Host, Refused, Server
from test_server import NODES, picture, sentence

NAME = "l2p"
"""The folder that a manager makes: the project's name in pyproject.toml."""


def tracked(*options: str) -> set[str]:
    """Files that git lists in the repository."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git repository")
    command = ["git", "-C", str(ROOT), "ls-files", "-z", *options]
    done = subprocess.run(command, capture_output=True, check=True)
    return {name for name in done.stdout.decode().split("\0") if name}


def published() -> set[str]:
    """What a registry gets: all of the repository but what .comfyignore names, in .gitignore's language."""
    return tracked() - tracked("--cached", "--ignored", "--exclude-from=.comfyignore")


@pytest.fixture(scope="module")
def installed(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server whose only custom nodes are a copy of the published files."""
    base = tmp_path_factory.mktemp("installed")
    for name in published():
        target = base / "custom_nodes" / NAME / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    with Server(host, base, "--cache-none") as server:
        yield server


def test_only_what_users_need_is_published() -> None:
    names = published()
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert folders == {"example_workflows", "l2p_core", "locales", "nodes", "subgraphs", "train", "web"}
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE", "py.typed"} <= names


def test_the_hosts_own_packages_are_all_it_takes(host: Host) -> None:
    """So that installing the requirements changes nothing, torch least of all: no index is asked."""
    command = [host.python, "-m", "pip", "install", "--no-index", "--dry-run", "-r", ROOT / "requirements.txt"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        pytest.skip("the host's environment has no pip")
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout


def test_the_published_files_run(installed: Server) -> None:
    assert set(installed.get("/object_info")) >= NODES
    assert "IMPORT FAILED" not in installed.log_text()
    assert picture(installed, installed.run(graphs.demo(steps=2)), "5").shape == (64, 64, 3)
    saving = graphs.demo(steps=1)
    saving["5"] = {"class_type": "L2PSaveTIFF", "inputs": saving["5"]["inputs"] | {"depth": "16-bit"}}
    if "  tifffile: " not in installed.get("/l2p/doctor").decode():
        with pytest.raises(Refused) as refused:
            installed.run(saving)
        assert "TIFF files need the package tifffile" in refused.value.sentences()
    graph = graphs.demo()
    graph["2"]["inputs"]["text"] = "a castle"
    assert "does not know the word 'castle'" in sentence(installed.run(graph))


def test_the_published_files_bring_pages_workflows_and_languages(installed: Server) -> None:
    for node in NODES:
        for page in (f"{node}.md", f"{node}/zh.md"):
            assert installed.get(f"/extensions/{NAME}/docs/{page}").startswith(b"# ")
    assert f"/extensions/{NAME}/report.js" in installed.get("/extensions")
    workflows = {Path(name).stem for name in published() if name.startswith("example_workflows/")}
    assert set(installed.get("/workflow_templates")[NAME]) == workflows
    for workflow in workflows:
        name = f"/api/workflow_templates/{NAME}/{workflow}"
        assert installed.get(f"{name}.json")["nodes"]
        assert installed.get(f"{name}.jpg").startswith(b"\xff\xd8")
    for language in ("en", "zh"):
        assert set(installed.get("/i18n")[language]["nodeDefs"]) >= NODES


def test_the_published_blueprints_are_offered(installed: Server) -> None:
    """The host finds them in the pack's folder, whatever the folder is called."""
    listed = installed.get("/global_subgraphs")
    ours = {entry["name"]: key for key, entry in listed.items() if entry["info"]["node_pack"].endswith(f".{NAME}")}
    assert ours.keys() == {Path(name).stem for name in published() if name.startswith("subgraphs/")} != set()
    for key in ours.values():
        assert json.loads(installed.get(f"/global_subgraphs/{key}")["data"])["definitions"]["subgraphs"]
