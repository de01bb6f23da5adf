"""`l2p inspect`: describes a file."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from ..l2p_core import freeze
from ..l2p_core.checkpoint import Checkpoint, check_exact, open_checkpoint
from ..l2p_core.config import COMFY_PREFIX, HEAD, PixelConfig
from ..l2p_core.deltas.low_rank import is_adapter
from ..l2p_core.files.metadata import stored_config
from ..l2p_core.files.units import bytes_text
from ..l2p_core.model import key_shapes
from ..l2p_core.sources import SOURCES
from ..l2p_core.sources.recognition import nearest_source
from ..l2p_core.tiny.bundled import resolve
from .console import count_text

_SHOWN_METADATA = 100  # characters of a value, unless everything is requested as JSON


def inspect(path: Path, keys: bool = False, as_json: bool = False) -> None:
    """Print what the file or folder contains.

    Raises:
        CheckpointError: if it cannot be read as a checkpoint, or belongs to another kind of model.
    """
    checkpoint = open_checkpoint(resolve(path))
    facts = describe(checkpoint)
    if as_json:
        if keys:
            facts["keys"] = {name: [stored.dtype, list(stored.shape)] for name, stored in checkpoint.tensors.items()}
        print(json.dumps(facts, indent=1))
        return
    print("\n".join(_lines(facts)))
    if keys:
        for name, stored in checkpoint.tensors.items():
            print(f"  {name}  {stored.dtype} {'x'.join(map(str, stored.shape)) or 'scalar'}")


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The facts about a checkpoint, ready for JSON."""
    facts: dict[str, Any] = {
        "path": str(checkpoint.path),
        "files": len(checkpoint.files),
        "bytes": checkpoint.bytes_on_disk,
        "layout": layout_of(checkpoint),
        "dtypes": _bytes_by_dtype(checkpoint),
        "tensors": len(checkpoint.tensors),
        "parameters": sum(stored.numel for stored in checkpoint.tensors.values()),
        "metadata": checkpoint.metadata,
    }
    if checkpoint.is_delta:
        return {**facts, "kind": "delta", **_about_delta(checkpoint)}
    config = checkpoint.config()
    check_exact(checkpoint, key_shapes(config))
    facts["parameters"] = sum(math.prod(shape) for shape in key_shapes(config).values())
    if checkpoint.quantisation:
        facts["quantised"] = checkpoint.quantisation
    facts |= {"kind": "latent source", "variant": None, "config": {"head": None} | dataclasses.asdict(config)}
    if isinstance(config, PixelConfig):
        facts |= {"kind": "pixel model", "variant": config.variant, "trained": _trained(config)}
    return facts


def _about_delta(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a delta states about its model, if its own tensors agree."""
    stated = stored_config(checkpoint.metadata)
    shapes = key_shapes(stated) if stated else {}
    full = {name: shape for name, shape in checkpoint.shapes.items() if not is_adapter(name)}
    if not isinstance(stated, PixelConfig) or any(shapes.get(name) != shape for name, shape in full.items()):
        return {}
    return {"variant": stated.variant, "config": dataclasses.asdict(stated)}


def layout_of(checkpoint: Checkpoint) -> str:
    """The naming scheme of the file: "diffusers", "comfy" or "comfy with prefix"."""
    names = [name for header in checkpoint.files for name in header.tensors]
    plain = [name.removeprefix(COMFY_PREFIX) for name in names]
    layout = nearest_source(plain).layout
    if any(layout.to_comfy(name) != (name, None) for name in plain):
        return "diffusers"
    return "comfy with prefix" if any(name.startswith(COMFY_PREFIX) for name in names) else "comfy"


def _bytes_by_dtype(checkpoint: Checkpoint) -> dict[str, int]:
    total: Counter[str] = Counter()
    for stored in checkpoint.tensors.values():
        total[stored.dtype] += stored.nbytes
    return dict(total.most_common())


def _trained(config: PixelConfig) -> dict[str, int]:
    """Number of parameters that the published policy trains, and of those in the head."""
    names = freeze.trainable_names(config)
    sizes = {name: math.prod(shape) for name, shape in key_shapes(config).items() if name in names}
    return {
        "parameters": sum(sizes.values()),
        "head": sum(size for name, size in sizes.items() if name.startswith(f"{HEAD}.")),
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    """The facts as text."""
    files = "" if facts["files"] == 1 else f" in {facts['files']} files"
    noun = "delta" if facts["kind"] == "delta" else "pixel model"
    kind = f"{facts['variant']} {noun}" if facts.get("variant") else facts["kind"]
    lines = [
        f"{facts['path']}",
        f"kind        {kind}, {facts['layout']} layout, {bytes_text(facts['bytes'])}{files}",
        f"parameters  {count_text(facts['parameters'])} in {facts['tensors']} tensors ("
        + ", ".join(f"{dtype} {bytes_text(size)}" for dtype, size in facts["dtypes"].items())
        + ")",
    ]
    if "quantised" in facts:
        lines.append(
            f"quantised   {facts['quantised']}: for sampling and merging deltas, not for conversion or training"
        )
    if "config" in facts:
        lines += _config_lines(facts["config"])
    if "trained" in facts:
        share = facts["trained"]["parameters"] / facts["parameters"]
        lines.append(
            f"trained     {count_text(facts['trained']['parameters'])} ({share:.0%}) by the published policy, "
            f"of which the head has {count_text(facts['trained']['head'])}"
        )
    if facts["metadata"]:
        lines.append("metadata")
        for name, value in facts["metadata"].items():
            cut = f"... ({len(value)} characters)" if len(value) > _SHOWN_METADATA else ""
            lines.append(f"  {name} = {value[:_SHOWN_METADATA]}{cut}")
    return lines


def _config_lines(config: dict[str, Any]) -> list[str]:
    source = SOURCES[config["source"]]
    trunk, refiners = (
        " + ".join(str(config[stack.count]) for stack in source.stacks if stack.trunk == wanted)
        for wanted in (True, False)
    )
    blocks = f"{trunk} blocks and {refiners} refiners" if refiners else f"{trunk} blocks"
    lines = [
        f"backbone    width {config['dim']}, {blocks}, "
        f"{config['dim'] // config['head_dim']} heads of {config['head_dim']} ({source.title}'s architecture)",
        f"input       {config['in_channels']} channels in patches of {config['patch_size']}, "
        f"captions {config['caption_dim']} wide",
    ]
    if config["head"]:
        widths = " ".join(f"{stage['name'].strip('_')}:{stage['enc']}" for stage in config["head"]["stages"])
        lines.append(f"head        stages {widths}, bottleneck {config['head']['bottleneck']}")
    return lines
