"""The facts for a bug report, in a running host."""

from __future__ import annotations

import sys

import comfy.cli_args
import comfy.options
import comfyui_version

from ...l2p_core.device.doctor import as_text, examine


def report() -> str:
    """The text of `l2p doctor`, with the host's version and the options that it was started with."""
    return as_text(examine({"ComfyUI": comfyui_version.__version__, "options": " ".join(_options()) or "none"}))


def _options() -> list[str]:
    """Options that the user gave and that differ from their defaults; for paths and addresses only that they are set.

    Parsed anew: the host changes its own, such as `fast` and `cuda_malloc`, while it starts.
    """
    parser = comfy.cli_args.parser
    given, _ = parser.parse_known_args(sys.argv[1:] if comfy.options.args_parsing else [])
    options = []
    for name, value in sorted(vars(given).items()):
        if value == parser.get_default(name):
            continue
        parts = value if isinstance(value, list) else [value]
        words = [str(getattr(part, "name", part)) for part in parts if _is_plain(part)]
        options.append(" ".join((f"--{name.replace('_', '-')}", *words)))
    return options


def _is_plain(value: object) -> bool:
    """Whether a value cannot contain anything private: a number, or one of a few words."""
    return (isinstance(value, (int, float)) and not isinstance(value, bool)) or hasattr(value, "name")
