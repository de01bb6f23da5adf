"""Our routes on the host's server: for the frontend's view of training, and for bug reports."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from .server import running_server

_PAGE = {
    "Content-Type": "text/html; charset=utf-8",
    # The page is self-contained and includes the user's names and captions: scripts and external content are blocked.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    "Cache-Control": "no-store",
}


async def _training(request: web.Request) -> web.Response:
    """The states of runs since the server started; with ?run=NAME that run's, if necessary from its folder."""
    from .live import last_states, state_of

    if not (run := _run(request)):
        return web.json_response(last_states())
    try:
        # Reading a long run's metrics takes a while, during which the server has other requests to answer.
        return web.json_response(await asyncio.to_thread(state_of, run))
    except (ValueError, KeyError, OSError):
        raise web.HTTPNotFound from None


async def _report(request: web.Request) -> web.StreamResponse:
    """A run's report as a page; by the host's /view it would be a download."""
    from .live import report_of

    try:
        report = report_of(_run(request))
    except ValueError:
        report = None
    if report is None:
        raise web.HTTPNotFound
    return web.FileResponse(report, headers=_PAGE)


async def _evaluation(request: web.Request) -> web.StreamResponse:
    """A report of Evaluate L2P as a page."""
    from ..folders.evaluations import page

    return _page(request, page)


async def _prompts(request: web.Request) -> web.StreamResponse:
    """A report of L2P Prompts as a page."""
    from ..folders.prompt_files import report

    return _page(request, report)


def _page(request: web.Request, path_of: Callable[[str], Path]) -> web.StreamResponse:
    """The page of the requested name."""
    try:
        page = path_of(request.query.get("name", ""))
    except ValueError:
        raise web.HTTPNotFound from None
    if not page.is_file():
        raise web.HTTPNotFound
    return web.FileResponse(page, headers=_PAGE)


def _run(request: web.Request) -> str:
    return request.query.get("run", "").strip()


async def _refused(request: web.Request) -> web.Response:
    """The problem with a file that one of the host's own loaders did not load; empty for other files than L2P's."""
    from ..folders.files import WHOLE_MODELS
    from .refused import refused_because

    folder, name = request.query.get("folder", ""), request.query.get("name", "")
    if folder not in WHOLE_MODELS or not name:
        raise web.HTTPNotFound
    return web.Response(text=await asyncio.to_thread(refused_because, folder, name))


async def _doctor(_: web.Request) -> web.Response:
    from .doctor import report

    return web.Response(text=report())


ROUTES = {
    "/l2p/training": _training,
    "/l2p/report": _report,
    "/l2p/evaluation": _evaluation,
    "/l2p/prompts": _prompts,
    "/l2p/refused": _refused,
    "/l2p/doctor": _doctor,
}


def register() -> None:
    """Add the routes to the running server, if there is one; the host publishes them when all packs are loaded."""
    if running_server() is not None:
        for address, answer in ROUTES.items():
            running_server().routes.get(address)(answer)
