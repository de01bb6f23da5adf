"""Messages of a node to the open workflow: its progress, and notes on its result."""

from __future__ import annotations

import logging
from collections.abc import Callable

from .server import running_server

EVENT = "l2p.said"


def tell_at(node: str | None) -> Callable[[str], None]:
    """A function that leaves a sentence in the node of this id until it runs again; an empty one removes it."""
    server = running_server()

    def tell(text: str) -> None:
        if text:
            logging.info("L2P: %s", text)
        if server is not None and node is not None:
            server.send_sync(EVENT, {"node": node, "text": text})

    return tell


def say_at(node: str | None) -> Callable[[str], None]:
    """A function that shows a text in the node of this id, for those who have the workflow open."""
    server = running_server()

    def say(text: str) -> None:
        if server is not None and node is not None:
            server.send_progress_text(text, node)

    return say
