"""Runs inside the host's Python: ComfyUI's modules, on the CPU, with the pack as `comfyui_l2p`.

The files here are called check_*.py, so that a run of the pack's own tests does not collect them; `test_inside.py`
hands them to the host's interpreter.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [os.environ["COMFYUI_PATH"], str(ROOT / "tests"), str(Path(__file__).parent)]

from comfy.cli_args import args  # noqa: E402

args.cpu = True
args.preview_method = type(args.preview_method).NoPreviews

spec = importlib.util.spec_from_file_location(
    "comfyui_l2p", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
)
assert spec is not None and spec.loader is not None
pack = importlib.util.module_from_spec(spec)
sys.modules["comfyui_l2p"] = pack
spec.loader.exec_module(pack)


@pytest.fixture(autouse=True, scope="session")
def user_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pack remembers between starts goes here, and not to the user's own."""
    import folder_paths

    folder = tmp_path_factory.mktemp("user")
    folder_paths.set_user_directory(str(folder))
    return folder
