"""Messages of a node to the open workflow: its progress, and notes on its result."""

from __future__ import annotations

import logging
from collections.abc import Callable

from .server import running_server

EVENT = "l2p.said"


def say_at(node: str | None) -> Callable[[str], None]:
    """A function that shows a sentence in the node of this id until its next one; an empty one removes it.

    The frontend shows it in the user's language, which it could not do with the host's own progress texts.
    """
    server = running_server()

    def say(text: str) -> None:
        if server is not None and node is not None:
            server.send_sync(EVENT, {"node": node, "text": text})

    return say


def tell_at(node: str | None) -> Callable[[str], None]:
    """`say_at` for what should be in the log too."""
    say = say_at(node)

    def tell(text: str) -> None:
        if text:
            logging.info("L2P: %s", text)
        say(text)

    return tell
