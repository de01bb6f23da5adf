"""What is installed: dependencies, packages, version, licence, files that travel with the code."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import comfyui_l2p

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def named(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9_-]", requirement, maxsplit=1)[0].lower() for requirement in requirements}


def test_no_user_of_comfyui_is_given_another_torch(project: dict[str, Any]) -> None:
    brought_by_host = {"torch", "torchvision", "torchaudio", "comfyui"}
    assert not named(project["project"]["dependencies"]) & brought_by_host
    assert not named((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()) & brought_by_host


def test_requirements_are_the_same_in_both_places(project: dict[str, Any]) -> None:
    listed = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in listed if line and not line.startswith("#")] == project["project"]["dependencies"]


def test_every_requirement_is_imported(project: dict[str, Any]) -> None:
    modules = {"pillow": "PIL"}
    files = (path for part in ("l2p_core", "nodes", "train") for path in (ROOT / part).rglob("*.py"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    for name in named(project["project"]["dependencies"]):
        assert re.search(rf"^\s*(import|from) {modules.get(name, name)}\b", text, re.MULTILINE), f"{name} is not used"


def test_version_agrees(project: dict[str, Any]) -> None:
    assert project["project"]["version"] == comfyui_l2p.__version__
    assert f"## {comfyui_l2p.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_package_is_installed(project: dict[str, Any]) -> None:
    folders = [ROOT, *(path.parent for part in ("l2p_core", "nodes", "train") for path in (ROOT / part).rglob("*.py"))]
    packages = {".".join(["comfyui_l2p", *folder.relative_to(ROOT).parts]) for folder in folders}
    assert set(project["tool"]["setuptools"]["packages"]) == packages


def test_data_files_travel_with_the_code(project: dict[str, Any]) -> None:
    for package, patterns in project["tool"]["setuptools"]["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"nothing in {package} matches {pattern}"


def test_weights_in_the_repository_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in (ROOT / "l2p_core" / "tiny").glob("*.safetensors")}
    source = sum(size for name, size in sizes.items() if name != "delta.safetensors")
    assert 0 < source < 10_000_000
    assert sizes.get("delta.safetensors", 0) < 10_000_000
    second = (ROOT / "l2p_core" / "tiny" / "scenes").glob("*.safetensors")
    assert sum(path.stat().st_size for path in second) < 12_000_000


def test_licence_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_python_versions(project: dict[str, Any]) -> None:
    """No upper bound: hosts bring newer Pythons before their packs are released anew."""
    assert project["project"]["requires-python"] == ">=3.10"


def test_the_registry_shows_pictures_by_address(project: dict[str, Any]) -> None:
    """A path within the repository, which the registry takes for an address, shows a broken picture."""
    for picture in ("Icon", "Banner"):
        assert project["tool"]["comfy"].get(picture, "https://").startswith("https://")
    assert all(address.startswith("https://") for address in project["project"]["urls"].values())
