"""`l2p doctor`: what a bug report needs to say about this machine."""

from __future__ import annotations

import json

from ..l2p_core.device.doctor import as_text, examine

_MORE = "How fast a GPU is here and how much memory it takes: l2p benchmark gpu, reported as docs/gpu-protocol.md says."


def doctor(as_json: bool = False) -> None:
    """Print it, for people or as JSON."""
    facts = examine()
    print(json.dumps(facts, indent=2) if as_json else f"{as_text(facts)}\n\n{_MORE}")
