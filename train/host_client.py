"""A client for a running ComfyUI's HTTP interface: one workflow in, one image out."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any

Json = dict[str, Any]
REQUEST_SECONDS = 60
"""How long a host may take to answer a request; loading a model takes that long."""
JSON_BYTES, IMAGE_BYTES = 1 << 26, 1 << 29
"""Maximum size of an answer. A PNG of 10240x10240 incompressible pixels has 420 MB."""
_REFUSAL_BYTES = 1 << 16  # of a host's explanation why it refuses a workflow
_POLL_FIRST, _POLL_LAST = 0.05, 0.5  # seconds between checks whether a workflow is done


class HostGone(Exception):
    """The host does not answer or has lost the workflow."""


class HostRefused(Exception):
    """The host cannot run this workflow for any prompt: a node or a file is missing there."""


class ImageFailed(Exception):
    """The host ran the workflow and failed, or did not return exactly one image of acceptable size."""


class Stopped(Exception):
    """The user has stopped the work."""


class HostClient:
    """A host.

    Args:
        address: such as 127.0.0.1:8188 or https://example.org/comfy.

    Raises:
        ValueError: for anything else.
    """

    def __init__(self, address: str):
        self.url = (address if "://" in address else f"http://{address}").rstrip("/")
        try:
            parts = urllib.parse.urlsplit(self.url)
            possible = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is not a number, or above 65535
            possible = False
        if not possible:
            raise ValueError(f"{address!r} is not the address of a host: write it as 127.0.0.1:8188.")
        self.name = self.url.partition("://")[2]

    def is_there(self) -> bool:
        """Whether it answers."""
        try:
            self._get("/queue")
        except (HostGone, ImageFailed):
            return False
        return True

    def make(self, workflow: Json, stopped: Callable[[], bool]) -> bytes:
        """Run a workflow and fetch its only image, as the content of a file.

        Raises:
            HostGone, HostRefused, ImageFailed: see there.
            Stopped: once `stopped` is true; the workflow is cancelled.
        """
        id = self._queue(workflow)
        try:
            entry = self._wait(id, stopped)
        except Stopped:
            self._take_back(id)
            raise
        try:
            with self._understood():
                image = _image_of(entry)
            return self._get("/view?" + urllib.parse.urlencode(image), IMAGE_BYTES)
        finally:
            self._forget(id)

    def _queue(self, workflow: Json) -> str:
        try:
            answer = self._parsed(self._post("/prompt", {"prompt": workflow}))
        except urllib.error.HTTPError as error:
            raise HostRefused(_refusal(error.read(_REFUSAL_BYTES))) from error
        if "prompt_id" not in answer:
            raise HostRefused("its answer does not name a workflow, as ComfyUI's does")
        return str(answer["prompt_id"])

    def _wait(self, id: str, stopped: Callable[[], bool]) -> Json:
        """The history's entry of a workflow, once it is done."""
        pause, missing = _POLL_FIRST, 0
        while True:
            if stopped():
                raise Stopped
            entry = self._parsed(self._get(f"/history/{id}")).get(id)
            if entry is not None:
                with self._understood():
                    return dict(entry)
            # Between queue and history, it may be in neither for a moment.
            missing = 0 if id in self._queued() else missing + 1
            if missing > 2:
                raise HostGone(f"{self.name} has dropped a workflow")
            time.sleep(pause)
            pause = min(pause * 1.5, _POLL_LAST)

    def _queued(self, kinds: tuple[str, ...] = ("queue_running", "queue_pending")) -> set[str]:
        queue = self._parsed(self._get("/queue"))
        with self._understood():
            return {str(entry[1]) for kind in kinds for entry in queue.get(kind, [])}

    def _take_back(self, id: str) -> None:
        try:
            self._post("/queue", {"delete": [id]})
            if id in self._queued(("queue_running",)):
                self._post("/interrupt", {"prompt_id": id})
        except (HostGone, ImageFailed, urllib.error.HTTPError):
            return  # a host that is gone runs nothing

    def _forget(self, id: str) -> None:
        """Remove a workflow from the host's history, which would otherwise grow with every image."""
        try:
            self._post("/history", {"delete": [id]})
        except (HostGone, ImageFailed, urllib.error.HTTPError):
            return  # its history ends with it

    def _get(self, path: str, limit: int = JSON_BYTES) -> bytes:
        try:
            return self._answer(urllib.request.Request(self.url + path), limit)
        except urllib.error.HTTPError as error:
            kind = ImageFailed if error.code < 500 else HostGone
            raise kind(f"{self.name} answers {error.code} to {path.partition('?')[0]}") from error

    def _parsed(self, answer: bytes) -> Json:
        with self._understood():
            return dict(json.loads(answer))

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """Within the block, JSON of another shape than ComfyUI's counts as no answer."""
        try:
            yield
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise HostGone(f"{self.name} does not answer as ComfyUI does") from error

    def _post(self, path: str, body: Json) -> bytes:
        """The answer; an HTTPError below 500 is raised to the caller, who may read the host's explanation."""
        headers = {"Content-Type": "application/json"}
        try:
            return self._answer(urllib.request.Request(self.url + path, json.dumps(body).encode(), headers))
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise
            raise HostGone(f"{self.name} answers {error.code} to {path}") from error

    def _answer(self, request: urllib.request.Request, limit: int = JSON_BYTES) -> bytes:
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as answer:
                content = bytes(answer.read(limit + 1))
        except urllib.error.HTTPError:
            raise
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise HostGone(f"{self.name} does not answer ({reason})") from error
        if len(content) > limit:
            raise ImageFailed(f"its answer is larger than the limit of {limit / 1e6:.0f} MB")
        return content


def _refusal(body: bytes) -> str:
    """The host's explanation why it refuses a workflow."""
    try:
        answer = json.loads(body)
        said = [problem for node in answer.get("node_errors", {}).values() for problem in node["errors"]]
        said = said or [answer["error"]]
        return "; ".join(f"{problem['message']} {problem['details']}".strip() for problem in said)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return body[:200].decode(errors="replace")


def _image_of(entry: Json) -> dict[str, str]:
    """The location of the only image in a history's entry."""
    status = entry.get("status") or {}
    if status.get("status_str") == "error":
        said = dict(message for message in status.get("messages", []) if len(message) == 2)
        if "execution_interrupted" in said:
            raise ImageFailed("it was interrupted at the host")
        raise ImageFailed(str(said.get("execution_error", {}).get("exception_message", "no reason given")).strip())
    outputs = entry.get("outputs") or {}
    images = [image for output in outputs.values() for image in output.get("images", [])]
    if len(images) != 1:
        raise ImageFailed(
            f"the workflow returns {len(images)} images, not one: use batch size 1 and a single Save Image or Preview "
            "Image"
        )
    return {key: str(images[0].get(key, "")) for key in ("filename", "subfolder", "type")}
