"""The host's models folders: the choices they offer, and the targets of results."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePath

import folder_paths

from ...l2p_core.files import paths
from ...l2p_core.files.safetensors_header import SUFFIXES, CheckpointError
from ...l2p_core.files.shards import files_of, index_of
from .names import below

FOLDER = "diffusion_models"
WHOLE_MODELS = (FOLDER, "checkpoints")
"""Folders that may contain L2P models: users put files with more than the diffusion model into the second."""
NO_FILE = "none"
TINY = "tiny source (comes with L2P)"
"""The name of the bundled latent model among the files of the folder."""
TINY_MODEL = "tiny model (comes with L2P)"
"""The name of the bundled pixel model, which is a delta on the bundled latent model."""


def choices(*folders: str) -> list[str]:
    """The models in the host's folders of some kinds (diffusion_models), as the user sees them, each name once:
    safetensors files; for shards, their folder, or their index if the folder is ambiguous."""
    names = [name for folder in folders or (FOLDER,) for name in folder_paths.get_filename_list(folder)]
    names = [name for name in dict.fromkeys(names) if name.lower().endswith(SUFFIXES)]
    indexes = {index for name in names if (index := index_of(name))}
    return [*(name for name in names if not index_of(name)), *sorted(_folders(indexes))]


def existing(name: str, *folders: str) -> str:
    """The full path of a model, a file or a folder of shards, in the first folder of the given kinds (diffusion_models)
    that has it, or of the bundled latent model.

    Raises:
        ValueError: if it does not exist.
    """
    path = _path(name, *folders)
    if path is None:
        places = " or ".join(f"models/{folder}" for folder in folders or (FOLDER,))
        raise ValueError(f"There is no file {name!r} in {places}: put it there, or press R to refresh the list.")
    return str(path)


def with_own_delta(name: str) -> tuple[str, str | None]:
    """The path of a model in the folders that may contain L2P models, and of its own delta if it is the bundled one.

    Raises:
        ValueError: as `existing`.
    """
    if name != TINY_MODEL:
        return existing(name, *WHOLE_MODELS), None
    from ...l2p_core.tiny.bundled import DELTA, SOURCE

    return str(SOURCE), str(DELTA)


def fingerprint(*names: str | None) -> list[str]:
    """A fingerprint of the models: names, sizes and times of their files."""
    return [paths.state(*_files(path)) for name in names if name and (path := _path(name, *WHOLE_MODELS))]


def target(name: str) -> Path:
    """The path of a result with this name: in models/diffusion_models, with the suffix .safetensors.

    Raises:
        ValueError: for an empty name, one that leads out of the folder, or, on Windows, one that Windows refuses.
    """
    root = _output_root()
    path = below(root, name)
    if path is None:
        raise ValueError(f"The file name {name!r} leads out of models/{FOLDER}: give a name inside it.")
    if path == root or path.name in SUFFIXES:
        raise ValueError("The file name is empty: give the new file a name.")
    if path.suffix.lower() not in SUFFIXES:
        path = path.with_name(path.name + SUFFIXES[0])
    return path


def new_file(name: str, overwrite: bool) -> Path:
    """`target`, with its folder created.

    Raises:
        ValueError: as for `target`, and for an existing file while `overwrite` is off.
    """
    path = target(name)
    if path.exists() and not overwrite:
        raise ValueError(
            f"{name_of(path)} already exists in models/{FOLDER}: choose another name, or switch overwrite on."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def private(name: str) -> Path:
    """The path of a private file of the pack, kept in the host's user folder, which the host does not serve."""
    return Path(folder_paths.get_system_user_directory("l2p")) / name


def name_of(path: Path) -> str:
    """The name under which the host lists a file that `target` placed."""
    return str(path.relative_to(_output_root()))


def _output_root() -> Path:
    """The folder of exactly that name, if the host has several: older setups list models/unet first."""
    folders = roots()
    return next((folder for folder in folders if folder.name == FOLDER), folders[0])


def roots(*folders: str) -> list[Path]:
    """The folders of some kinds; of diffusion models by default."""
    return [Path(root).absolute() for folder in folders or (FOLDER,) for root in folder_paths.get_folder_paths(folder)]


def _folders(indexes: Iterable[str]) -> list[str]:
    """Shards as they are offered: by their folder, or by their index if they are in the models folder itself or beside
    those of another model."""
    parents = [PurePath(index).parent for index in indexes]
    return [
        str(parent) if parent.name and parents.count(parent) == 1 else index
        for index, parent in zip(indexes, parents, strict=True)
    ]


def _path(name: str, *folders: str) -> Path | None:
    if name == TINY:
        from ...l2p_core.tiny import SOURCE_PATH

        return SOURCE_PATH
    name = index_of(name) or name
    found = ((root, paths.inside(root, name)) for root in roots(*folders))
    # The host warns of a link to a folder that it "doesn't link anywhere".
    if path := next((path for root, path in found if path and path != root and path.is_dir()), None):
        return path
    for folder in folders or (FOLDER,):
        if full := folder_paths.get_full_path(folder, name):
            return Path(full)
    return None


def _files(model: Path) -> list[Path]:
    try:
        return files_of(model)
    except CheckpointError:
        return [model]  # errors are reported when it is read
