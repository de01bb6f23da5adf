"""As much of ComfyUI's HTTP interface as `l2p synth` uses, with hosts that fail in every way."""

from __future__ import annotations

import io
import json
import threading
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image

Json = dict[str, Any]

WORKFLOW: Json = {
    "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "photo, {prompt}", "clip": ["9", 1]}},
    "2": {"class_type": "KSampler", "inputs": {"seed": 5, "steps": 8, "cfg": 1.5, "sampler_name": "euler"}},
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
}


class FakeHost:
    """A host on loopback whose images tell their seed.

    Args:
        behave: of the workflow's number, counted from 1: what becomes of it, "ok" or a way to fail.
    """

    def __init__(self, behave: Callable[[int], str] = lambda number: "ok"):
        self.behave = behave
        self.taken: list[Json] = []
        self.history: dict[str, Json] = {}
        self.running: dict[str, Json] = {}
        self.interrupts: list[str] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"host": self}))
        self.server.daemon_threads = True
        self.address = f"127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> FakeHost:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.die()

    def die(self) -> None:
        """Stop answering."""
        self.server.shutdown()
        self.server.server_close()

    def take(self, workflow: Json) -> tuple[int, Json]:
        """Queue a workflow: status and answer of POST /prompt."""
        with self.lock:
            self.taken.append(workflow)
            id, kind = str(uuid.uuid4()), self.behave(len(self.taken))
            if kind == "refuse":
                problem = {"message": "Value not in list", "details": "unet_name: 'z.safetensors' not in []"}
                return 400, {"error": {}, "node_errors": {"1": {"errors": [problem]}}}
            if kind == "hang":
                self.running[id] = workflow
            elif kind != "drop":
                self.history[id] = self._entry(workflow, kind)
            return 200, {"prompt_id": id}

    @staticmethod
    def _entry(workflow: Json, kind: str) -> Json:
        if kind == "error":
            said = [["execution_start", {}], ["execution_error", {"exception_message": "out of memory\n"}]]
            return {"outputs": {}, "status": {"status_str": "error", "messages": said}}
        name = kind if kind in ("broken", "eps", "huge", "black") else str(workflow["2"]["inputs"]["seed"])
        image = {"filename": name, "subfolder": "", "type": "temp"}
        count = 2 if kind == "two" else 1
        return {"outputs": {"3": {"images": [image] * count}}, "status": {"status_str": "success"}}

    @staticmethod
    def picture(name: str) -> bytes:
        """The file of an image: its colour tells its seed."""
        content = io.BytesIO()
        if name == "broken":
            return b"no image"
        if name == "eps":
            Image.new("RGB", (8, 8)).save(content, format="EPS")
            return content.getvalue()
        if name == "black":
            Image.new("RGB", (8, 8)).save(content, format="PNG")
            return content.getvalue()
        if name == "huge":
            return bytes(1 << 20)
        Image.new("RGBA", (8, 8), (*int(name).to_bytes(6, "big")[-3:], 255)).save(content, format="PNG")
        return content.getvalue()


class _Handler(BaseHTTPRequestHandler):
    host: FakeHost

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if parts.path == "/queue":
            with self.host.lock:
                running = [[0, id, workflow, {}, []] for id, workflow in self.host.running.items()]
            self._answer(200, {"queue_running": running, "queue_pending": []})
        elif parts.path.startswith("/history/"):
            id = parts.path.rpartition("/")[2]
            self._answer(200, {id: self.host.history[id]} if id in self.host.history else {})
        elif parts.path == "/view":
            self._answer(200, self.host.picture(parse_qs(parts.query)["filename"][0]))
        else:
            self._answer(404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/prompt":
            self._answer(*self.host.take(body["prompt"]))
            return
        if self.path == "/interrupt":
            self.host.interrupts.append(body["prompt_id"])
            self.host.running.pop(body["prompt_id"], None)
        elif self.path == "/history":
            for id in body["delete"]:
                self.host.history.pop(id, None)
        self._answer(200, {})

    def _answer(self, status: int, body: Json | bytes) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: tests read what the command prints."""
