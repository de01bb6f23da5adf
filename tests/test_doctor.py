"""`l2p doctor`: what it tells, on sound machines and on damaged ones, and that it tells no more."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import torch

from comfyui_l2p import __version__
from comfyui_l2p.l2p_core.dataset import formats
from comfyui_l2p.l2p_core.device import doctor
from comfyui_l2p.train.cli import main


def test_it_tells_versions_devices_memory_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == ["versions", "host", "devices", "memory", "environment", "missing"]
    assert facts["versions"]["l2p"] == __version__ and facts["versions"]["torch"] == torch.__version__
    assert "cpu" in facts["devices"] and facts["memory"]["RAM"].startswith(f"{psutil.virtual_memory().total / 1e9:.1f}")
    assert not any("torch is" in sentence or "einops" in sentence for sentence in facts["missing"])
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"  torch: {torch.__version__}\n" in text and str(Path.home()) not in text
    assert "docs/gpu-protocol.md" in text.splitlines()[-1]
    assert (Path(__file__).parents[1] / "docs" / "gpu-protocol.md").is_file()


def test_what_is_missing_or_too_old_is_said_with_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {library.name: "99.0" for library in doctor._LIBRARIES} | {"torch": "2.3.1+cu121"}
    del versions["transformers"], versions["safetensors"]

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    assert sorted(doctor.examine()["missing"]) == [
        "safetensors 0.4.2 or newer is not installed; needed for everything.",
        "torch 2.3.1+cu121 is too old for everything: it needs torch 2.4 or newer.",
        "transformers 4.51 or newer is not installed; optional for language models on the command line: --encoder, l2p "
        "prompts --model.",
    ]


def test_every_package_that_reads_images_is_on_the_list() -> None:
    known = {library.name for library in doctor._LIBRARIES}
    in_pillow = {"pillow-avif-plugin"}  # Pillow reads AVIF itself
    assert known >= {plugin.package for plugin in formats.PLUGINS.values()} - in_pillow
    assert known >= {"tifffile", "imagecodecs", "av", "pydicom", "pylibjpeg"}


def test_it_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(f"CUDA driver\nnot found in {Path.home() / 'drivers'}")

    for owner, name in ((psutil, "virtual_memory"), (torch, "get_num_threads"), (metadata, "version")):
        monkeypatch.setattr(owner, name, broken)
    facts = doctor.examine()
    said = "unknown (RuntimeError: CUDA driver not found in ~"
    assert facts["memory"].startswith(said) and facts["devices"]["cpu"].startswith(said)
    assert facts["versions"].startswith(said) and facts["missing"].startswith(said)
    assert str(Path.home()) not in doctor.as_text(facts)


def test_it_works_without_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['psutil'] = None\n"
        "from comfyui_l2p.train.cli import main; sys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "devices:\n  unknown (ModuleNotFoundError" in done.stdout


def test_a_host_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    text = doctor.as_text(doctor.examine({"ComfyUI": "0.33.0", "options": "--lowvram"}))
    assert "host:\n  ComfyUI: 0.33.0\n  options: --lowvram\n" in text
    assert "environment:\n  CUDA_VISIBLE_DEVICES: 1\n" in text
