"""The facts for a bug report, in a running host."""

from __future__ import annotations

import comfy.cli_args
import comfyui_version

from ...l2p_core.device.doctor import as_text, examine


def report() -> str:
    """The text of `l2p doctor`, with the host's version and the options that it was started with."""
    return as_text(examine({"ComfyUI": comfyui_version.__version__, "options": " ".join(_options()) or "none"}))


def _options() -> list[str]:
    """Options that differ from their defaults; for paths and addresses only that they are set."""
    parser = comfy.cli_args.parser
    options = []
    for name, value in sorted(vars(comfy.cli_args.args).items()):
        if value == parser.get_default(name):
            continue
        told = f" {value.name if hasattr(value, 'name') else value}" if _is_plain(value) else ""
        options.append(f"--{name.replace('_', '-')}{told}")
    return options


def _is_plain(value: object) -> bool:
    """Whether a value cannot contain anything private: a number, or one of a few words."""
    return (isinstance(value, (int, float)) and not isinstance(value, bool)) or hasattr(value, "name")
