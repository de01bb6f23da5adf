"""A ComfyUI workflow in API format as a template: every image is the workflow with its own prompt and seed.

`{prompt}` in any text is replaced by the prompt, and every input named seed or noise_seed takes the image's seed, as a
value or through the number node connected to it. Nothing else changes except Save Image, which becomes Preview Image so
that images do not accumulate in the host's output folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..l2p_core.dataset.tables import decoded

PLACEHOLDER = "{prompt}"
SEED_INPUTS = ("seed", "noise_seed")
_NAMED = {
    "steps": ("steps",),
    "cfg": ("cfg", "guidance"),
    "sampler": ("sampler_name",),
    "scheduler": ("scheduler",),
    "width": ("width",),
    "height": ("height",),
    "model": ("unet_name", "ckpt_name", "file"),
}
"""Inputs that identify a setting, in order of preference; the first node that has one counts."""

Json = dict[str, Any]


class Workflow:
    """A workflow with places for a prompt and a seed.

    Args:
        nodes: in API format: by id, each with class_type and inputs.
        name: of the file, for messages.

    Raises:
        ValueError: if it has no place for a prompt, or for a seed.
    """

    def __init__(self, nodes: Json, name: str):
        self._nodes = {id: _unsaved(node) for id, node in nodes.items()}
        if not any(PLACEHOLDER in value for *_, value in self._texts()):
            raise ValueError(
                f"No text in {name} contains {PLACEHOLDER}: write it as the positive prompt, then export the workflow "
                "again."
            )
        self._seeds = list(dict.fromkeys(self._seed_places()))
        if not self._seeds:
            raise ValueError(f"No node of {name} has an input named {' or '.join(SEED_INPUTS)} that is a number.")

    @classmethod
    def load(cls, path: Path) -> Workflow:
        """Read a file; errors as for the class, and a ValueError if it is not a workflow in API format."""
        text = decoded(path)
        try:
            nodes = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON: export the workflow from ComfyUI in API format.") from error
        if isinstance(nodes, dict) and isinstance(nodes.get("nodes"), list):
            raise ValueError(
                f"{path} is a workflow in ComfyUI's own format: export it in API format (Workflow, Export (API))."
            )
        if not isinstance(nodes, dict) or not nodes or not all(_is_node(node) for node in nodes.values()):
            raise ValueError(
                f"{path} is not a workflow in API format: export one from ComfyUI (Workflow, Export (API))."
            )
        return cls(nodes, str(path))

    def filled(self, prompt: str, seed: int) -> Json:
        """The workflow for one image, ready to be queued."""
        nodes: Json = json.loads(json.dumps(self._nodes))
        for id, key, value in self._texts():
            nodes[id]["inputs"][key] = value.replace(PLACEHOLDER, prompt)
        for id, key in self._seeds:
            nodes[id]["inputs"][key] = seed
        return nodes

    def settings(self) -> dict[str, str | int | float]:
        """The settings of the images besides prompt and seed: common inputs of nodes, and a digest of everything."""
        found: dict[str, str | int | float] = {}
        for setting, names in _NAMED.items():
            values = (value for name in names for node in self._nodes.values() for value in [node["inputs"].get(name)])
            found[setting] = next((value for value in values if isinstance(value, str | int | float)), "")
        content = json.dumps(self.filled(PLACEHOLDER, 0), sort_keys=True)
        return {**found, "workflow": hashlib.sha256(content.encode()).hexdigest()[:16]}

    def _texts(self) -> Iterator[tuple[str, str, str]]:
        for id, node in self._nodes.items():
            for key, value in node["inputs"].items():
                if isinstance(value, str):
                    yield id, key, value

    def _seed_places(self) -> Iterator[tuple[str, str]]:
        for id, node in self._nodes.items():
            for key in SEED_INPUTS:
                value = node["inputs"].get(key)
                if _is_number(value):
                    yield id, key
                elif isinstance(value, list) and value and value[0] in self._nodes:
                    wired = self._nodes[value[0]]["inputs"]
                    yield from ((value[0], name) for name in ("value", *SEED_INPUTS) if _is_number(wired.get(name)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_node(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


def _unsaved(node: Json) -> Json:
    if node["class_type"] != "SaveImage":
        return node
    return {"class_type": "PreviewImage", "inputs": {"images": node["inputs"].get("images")}}
