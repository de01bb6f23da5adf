"""TOML as recipes are written in."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

BACKSLASHES = "write a path with \\ in single quotes, or with /"
"""Advice for Windows paths."""

_PAIR = re.compile(r"\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})")
"""An emoji, or another character above U+FFFF, as JSON escapes it: as two halves, which TOML refuses."""


def read_toml(text: str) -> dict[str, Any]:
    """A TOML document.

    Characters above U+FFFF may be escaped as in JSON: version 0.1 wrote them so.

    Raises:
        ValueError: "not valid TOML" and where.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(_PAIR.sub(lambda pair: _joined(*pair.groups()), text.removeprefix("\ufeff")))
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets in thousands
        advice = f"; {BACKSLASHES}" if "\\" in text else ""
        raise ValueError(f"not valid TOML: {error}{advice}") from error


def toml_value(value: str | int | float | bool | list[str]) -> str:
    """A value as TOML writes it: as JSON does, except for characters above U+FFFF."""
    return _PAIR.sub(lambda pair: f"\\U{ord(_joined(*pair.groups())):08x}", json.dumps(value))


def _joined(high: str, low: str) -> str:
    return chr(0x10000 + ((int(high, 16) & 0x3FF) << 10) + (int(low, 16) & 0x3FF))
