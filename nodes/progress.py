"""Words on how far a node is, shown in it while it runs."""

from __future__ import annotations

from collections.abc import Callable


def say_at(node: str | None) -> Callable[[str], None]:
    """A function that shows a text in the node of this id, for those who have the workflow open."""
    # The host has loaded it long before; where its modules are used without a server, nobody is there to tell.
    from server import PromptServer

    def say(text: str) -> None:
        server = getattr(PromptServer, "instance", None)
        if server is not None and node is not None:
            server.send_progress_text(text, node)

    return say
