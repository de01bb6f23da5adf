"""Addresses of ours below the host's: what the frontend asks about training, and what a bug report needs to say."""

from __future__ import annotations

import sys
from typing import Any

from aiohttp import web


def running_server() -> Any:
    """The running server; None where the host's modules are used without one, which may not even import it."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


async def _training(_: web.Request) -> web.Response:
    from .live import last_states

    return web.json_response(last_states())


async def _doctor(_: web.Request) -> web.Response:
    from .doctor import report

    return web.Response(text=report())


ROUTES = {"/l2p/training": _training, "/l2p/doctor": _doctor}

if running_server() is not None:
    for address, answer in ROUTES.items():
        running_server().routes.get(address)(answer)
