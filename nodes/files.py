"""The host's models folders: what can be chosen, and where results may go."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..l2p_core.tiny import SOURCE_PATH
from .names import as_path

FOLDER = "diffusion_models"
WHOLE_MODELS = (FOLDER, "checkpoints")
"""Where an L2P model may lie: people put files that hold more than the diffusion model into the second."""
NO_FILE = "none"
TINY = "tiny source (comes with L2P)"
"""Stands for the bundled latent model among the files of the folder."""


def choices(*folders: str) -> list[str]:
    """The safetensors files in the host's folders of some kinds (diffusion_models), each name once."""
    names = [name for folder in folders or (FOLDER,) for name in folder_paths.get_filename_list(folder)]
    return [name for name in dict.fromkeys(names) if name.lower().endswith((".safetensors", ".sft"))]


def models(*folders: str) -> list[str]:
    """`choices`, and the bundled latent model after them."""
    return [*choices(*folders), TINY]


def existing(name: str, *folders: str) -> str:
    """The full path of a file in the first of some folders (diffusion_models) that has it, or of the bundled model.

    Raises:
        ValueError: if there is none of that name.
    """
    if name == TINY:
        return str(SOURCE_PATH)
    path = _found(name, *folders)
    if path is None:
        places = " or ".join(f"models/{folder}" for folder in folders or (FOLDER,))
        raise ValueError(f"There is no file {name!r} in {places}: put it there, or press R to refresh the list.")
    return path


def _found(name: str, *folders: str) -> str | None:
    paths = (folder_paths.get_full_path(folder, name) for folder in folders or (FOLDER,))
    return next((path for path in paths if path), None)


def fingerprint(*names: str | None) -> list[tuple[str, int, int]]:
    """What tells that one of the files has changed: names, sizes and times."""
    found = []
    for name in names:
        path = _found(name, *WHOLE_MODELS) if name else None
        if name and path:
            stat = Path(path).stat()
            found.append((name, stat.st_size, stat.st_mtime_ns))
    return found


def target(name: str) -> Path:
    """Where a result of this name goes: models/diffusion_models, with the suffix .safetensors.

    Raises:
        ValueError: for an empty name, one that leads out of the folder, or one that Windows refuses, there.
    """
    root = _output_root().resolve()
    relative = as_path(name)
    if relative.name in ("", ".safetensors", ".sft"):
        raise ValueError("The file name is empty: give the new file a name.")
    if relative.suffix.lower() not in (".safetensors", ".sft"):
        relative = relative.with_name(relative.name + ".safetensors")
    path = (root / relative).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"The file name {name!r} leads out of models/{FOLDER}: give a name inside it.")
    return path


def new_file(name: str, overwrite: bool) -> Path:
    """`target`, its folder made.

    Raises:
        ValueError: as `target`, and for a file that exists while `overwrite` is off.
    """
    path = target(name)
    if path.exists() and not overwrite:
        raise ValueError(
            f"{name_of(path)} exists already in models/{FOLDER}: choose another name, or switch overwrite on."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def private(name: str) -> Path:
    """Where the pack may keep a file of its own between starts: in the host's user folder, which it does not serve."""
    return Path(folder_paths.get_system_user_directory("l2p")) / name


def name_of(path: Path) -> str:
    """The name under which the host lists a file that `target` placed."""
    return str(path.relative_to(_output_root().resolve()))


def _output_root() -> Path:
    """The folder of that very name, if the host has several: older setups list models/unet first."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]
    return next((folder for folder in folders if folder.name == FOLDER), folders[0])
