"""`l2p doctor`: the facts about this machine for a bug report."""

from __future__ import annotations

import json

from ..l2p_core.device.doctor import as_text, examine

_MORE = "To measure speed and memory on a GPU, run l2p benchmark gpu and report it as docs/gpu-protocol.md describes."


def doctor(as_json: bool = False) -> None:
    """Print them as text or as JSON."""
    facts = examine()
    print(json.dumps(facts, indent=2) if as_json else f"{as_text(facts)}\n\n{_MORE}")
