"""Messages of a node to the open workflow: its progress, notes on its result, and warnings."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from .server import running_server

EVENT = "l2p.said"


def say_at(node: str | None) -> Callable[[str], None]:
    """A function that shows the progress in the node of this id.

    The frontend shows it in the user's language, which it could not do with the host's own progress texts.
    """
    return partial(_send, node, "progress")


def tell_at(node: str | None) -> Callable[[str], None]:
    """A function that leaves a sentence in the node of this id until it runs again; an empty one removes it."""

    def tell(text: str) -> None:
        if text:
            logging.info("L2P: %s", text)
        _send(node, "said", text)

    return tell


def warn_where_running(text: str) -> None:
    """Show a warning at the node that runs, which may be the host's, and write it to the log."""
    logging.warning("L2P: %s", text)
    _send(getattr(running_server(), "last_node_id", None), "warning", text)


def _send(node: str | None, kind: str, text: str) -> None:
    server = running_server()
    if server is not None and node is not None:
        server.send_sync(EVENT, {"node": node, "kind": kind, "text": text})
