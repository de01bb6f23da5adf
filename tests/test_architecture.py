"""The direction of imports, read from the sources: what each part of the package may know."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOST = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "server",
}
PARTS = ("l2p_core", "nodes", "train")
MODULES = [ROOT / "__init__.py", *sorted(path for part in PARTS for path in (ROOT / part).rglob("*.py"))]
ALLOWED = {"l2p_core": {"l2p_core"}, "nodes": {"nodes", "l2p_core"}, "train": {"train", "l2p_core"}}
"""Which top-level parts each part may import from."""

ORDER = {
    "l2p_core": (
        ("version", "ranges"),
        ("config", "patch"),
        ("device",),
        ("ops",),
        ("backbone", "detailer"),
        ("sources",),
        ("model", "layouts", "initialise", "flow", "growth", "head_windows"),
        ("files", "head_pairs"),
        ("checkpoint", "freeze", "patch_pairs", "head_fit"),
        ("convert", "hybrid"),
        ("deltas",),
        ("delta", "training_config"),
        ("quantise",),
        ("distributed",),
        ("memory",),
        ("training",),
        ("deep_images",),
        ("dataset",),
        ("tiny",),
        ("run",),
        ("prompts", "evaluate"),
    ),
    "nodes": (
        ("options", "training_choices", "limited"),
        ("folders",),
        ("messages", "sizes"),
        ("model",),
        ("pixels", "previews", "clip_captions", "clip_writer", "hybrid_tasks", "file_node"),
        ("sampling", "image_loading", "saving", "synthesis", "training", "evaluation", "hybrid"),
        ("comparison", "hybrid_checks"),
        ("hybrid_sampling",),
        (
            "compare_node",
            "convert_nodes",
            "dual_node",
            "evaluate_node",
            "hybrid_part_nodes",
            "hybrid_nodes",
            "load_image_node",
            "load_nodes",
            "pixel_nodes",
            "prompts_node",
            "quantise_node",
            "sampler_node",
            "save_nodes",
            "synthesize_node",
            "train_node",
        ),
    ),
    "train": (
        ("arguments", "console", "doctor", "figure", "image_benchmarks", "interrupt", "patch_grid", "pictures"),
        ("host_client", "prompt_model", "prompt_server", "sample_memory", "streams", "text_encoder", "workflow"),
        ("fleet", "own_folder", "run", "sample_captions", "sampler", "scores"),
        ("evaluate_images", "evaluate_scores", "files", "inspect_file", "make_tiny_source", "prompts"),
        ("demo", "evaluate_benchmark", "plan", "sample", "synth"),
        ("benchmark",),
        ("file_commands", "image_commands", "prompt_commands", "run_commands", "scenes"),
        ("evaluate_commands",),
        ("cli",),
        ("__main__",),
    ),
}
"""The rooms and flat files of a part, the lowest first: each imports from those before it and from its own line."""
LATE = {("config", "sources"), ("files", "quantise"), ("stock", "host")}
"""The imports that run upwards, inside functions, by rooms or files: `ModelConfig.from_shapes` asks the sources, whose
configurations are subclasses of it; `files.quantise` is a public name; the row in the host's list imports what answers
for it when the first file of ours is loaded."""
FLOOR = {(part, name): floor for part, floors in ORDER.items() for floor, names in enumerate(floors) for name in names}
ORDERED = [
    path
    for path in MODULES
    if path.relative_to(ROOT).parts[0] in ORDER and path.parent.parent / path.name != ROOT / "__init__.py"
]


def imports(path: Path) -> set[tuple[str, ...]]:
    """Every import of a file as its parts: a relative one resolved from the root, as ("", "l2p_core", "config")."""
    package = ("", *path.relative_to(ROOT).parent.parts)
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            base = package[: len(package) - node.level + 1] + module if node.level else module
            found |= {(*base, alias.name) for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            named = node.args[0].value if isinstance(node.args[0], ast.Constant) else ""
            if isinstance(named, str) and named:
                parts = tuple(named.lstrip(".").split("."))
                level = len(named) - len(named.lstrip("."))
                found.add((*package[: len(package) - level + 1], *parts) if level else parts)
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_parts_import_only_what_they_may(path: Path) -> None:
    part = path.relative_to(ROOT).parts[0]
    if part == "__init__.py":
        return
    for found in imports(path):
        assert found[0] != "comfyui_l2p", f"{found} must be relative: the host loads the pack under another name"
        if found[0] == "":
            assert found[1] in ALLOWED[part], f"{name(path)} must not import {'.'.join(found)}"
        if part != "nodes":
            assert found[0] not in HOST, f"{name(path)} must not import the host's {found[0]}"


@pytest.mark.parametrize("path", ORDERED, ids=name)
def test_no_import_runs_upwards(path: Path) -> None:
    part, room = path.relative_to(ROOT).with_suffix("").parts[:2]
    assert (part, room) in FLOOR, f"{room} is missing from ORDER"
    for found in imports(path):
        if found[:2] == ("", part):
            below = FLOOR[part, found[2]] <= FLOOR[part, room] or (room, found[2]) in LATE
            assert below, f"{name(path)} must not import {'.'.join(found[1:])}"


@pytest.mark.parametrize(("part", "room"), FLOOR)
def test_every_room_is_there(part: str, room: str) -> None:
    assert (ROOT / part / room).is_dir() or (ROOT / part / f"{room}.py").is_file()


@pytest.mark.parametrize("part", ORDER)
def test_no_files_import_each_other_in_a_circle(part: str) -> None:
    files = {path.relative_to(ROOT).with_suffix("").parts: path for path in ORDERED if path.is_relative_to(ROOT / part)}
    below = {
        module: {
            below
            for found in imports(path)
            for below in (found[1:3], found[1:4], found[1:5])
            if below in files and not {(module[1], below[1]), (module[-1], below[-1])} & LATE
        }
        for module, path in files.items()
    }
    while leaves := {module for module, found in below.items() if not found & below.keys()}:
        below = {module: found for module, found in below.items() if module not in leaves}
    assert not below, f"these import each other: {sorted('.'.join(module) for module in below)}"


def test_the_reader_of_imports_sees_every_form() -> None:
    found = imports(ROOT / "l2p_core" / "tiny" / "generate.py")
    assert ("", "l2p_core", "flow") in found
    assert ("", "l2p_core", "model", "LatentModel") in found
    assert ("", "l2p_core", "tiny", "words", "Words") in found
    assert ("torch",) in found
    assert ("", "l2p_core", "quantise") in imports(ROOT / "l2p_core" / "files" / "__init__.py")


def test_no_pickle_and_no_code_from_data() -> None:
    forbidden = {"eval", "exec", "compile", "__import__"}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in forbidden | {"torch.load"}, f"{name(path)} calls {called}"
        assert not {found[0] for found in imports(path)} & {"pickle", "dill", "joblib"}


def test_importing_the_package_needs_neither_torch_nor_the_host() -> None:
    program = "import sys; import comfyui_l2p; print([m for m in ('torch', 'numpy', 'comfy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_stay_short() -> None:
    for path in MODULES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, f"{name(path)} is longer than 350 lines"
