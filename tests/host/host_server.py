"""Starts ComfyUI on loopback with this pack, and speaks its HTTP and websocket interface."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 180
SAID = "l2p.said"
"""The message that shows in a node how far it is, or what to know of its result."""
Json = dict[str, Any]


@dataclass(frozen=True)
class Host:
    """A ComfyUI checkout and the interpreter that runs it."""

    path: Path
    python: Path


class Refused(Exception):
    """The server did not accept a workflow; `errors` are its node errors."""

    def __init__(self, body: Json):
        super().__init__(json.dumps(body)[:2000])
        self.errors: Json = body.get("node_errors", {})

    def sentences(self) -> str:
        """Everything the user would read at the nodes."""
        problems = [problem for node in self.errors.values() for problem in node["errors"]]
        return "\n".join(f"{problem['message']}: {problem['details']}" for problem in problems)


class Server:
    """A running ComfyUI; its base directory holds models, input, output and a link to the pack.

    Where custom nodes lie there already, they are what it runs. By default it runs on the CPU.
    """

    def __init__(self, host: Host, base: Path, *flags: str, device: str = "--cpu", **environment: str):
        self.host, self.base, self.flags = host, base, (device, *flags)
        self.environment = environment
        self.port = _free_port()
        self.log = base / "server.log"

    def __enter__(self) -> Server:
        for folder in ("models/diffusion_models", "models/loras", "input", "output", "custom_nodes"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        custom_nodes = self.base / "custom_nodes"
        if not any(custom_nodes.iterdir()):
            _bring_pack(custom_nodes / "ComfyUI-L2P")
        command = [
            *(self.host.python, "main.py", "--listen", "127.0.0.1", "--port", self.port),
            *("--base-directory", self.base, "--database-url", "sqlite:///:memory:"),
            *("--preview-method", "latent2rgb", "--disable-auto-launch", *self.flags),
        ]
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                cwd=self.host.path,
                env=os.environ | self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_up()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def _stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"ComfyUI ended:\n{self.log_text()[-3000:]}"
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        raise TimeoutError(f"ComfyUI did not answer:\n{self.log_text()[-3000:]}")

    def log_text(self) -> str:
        """What the server has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> Any:
        """JSON of a GET request, or its bytes where it is something else."""
        address = f"http://127.0.0.1:{self.port}{urllib.parse.quote(path, safe='/?=&%')}"
        with urllib.request.urlopen(address, timeout=60) as answer:
            body = answer.read()
            return json.loads(body) if "json" in answer.headers.get("Content-Type", "") else body

    def post(self, path: str, body: Json) -> Any:
        """JSON of a POST request."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else {}

    def run(
        self, prompt: Json, interrupt_at: int | None = None, interrupt_when: Callable[[Run], bool] | None = None
    ) -> Run:
        """Queue a workflow in API form and follow it to its end over the websocket.

        Args:
            interrupt_at: stop it as soon as a node reports this much progress.
            interrupt_when: stop it as soon as this says so of what has been reported.

        Raises:
            Refused: if the server does not accept it.
        """
        client = uuid.uuid4().hex
        with WebSocket(self.port, f"/ws?clientId={client}") as socket_:
            try:
                prompt_id = self.post("/prompt", {"prompt": prompt, "client_id": client})["prompt_id"]
            except urllib.error.HTTPError as error:
                raise Refused(json.loads(error.read())) from None
            run = Run(prompt_id)
            if interrupt_at is not None:
                interrupt_when = partial(_has_come_to, interrupt_at)
            while not run.ended:
                message = socket_.receive()
                run.take(message)
                if interrupt_when is not None and interrupt_when(run):
                    self.post("/interrupt", {})
                    interrupt_when = None
        return run


def _has_come_to(progress: int, run: Run) -> bool:
    return bool(run.progress) and run.progress[-1][1] >= progress


class Run:
    """What the server said about one workflow."""

    def __init__(self, prompt_id: str):
        self.prompt_id = prompt_id
        self.ended = False
        self.error: Json | None = None
        self.interrupted = False
        self.progress: list[tuple[str, int, int]] = []
        self.previews: list[bytes] = []
        self.texts: list[str] = []
        self.outputs: dict[str, Json] = {}
        self.ran: set[str] = set()

    def take(self, message: bytes | Json) -> None:
        """Note one websocket message."""
        if isinstance(message, bytes):
            self.previews.append(message)
            return
        kind, data = message["type"], message["data"]
        if kind == SAID:
            if data["kind"] == "progress":
                self.texts.append(data["text"])
            return
        if kind != "progress" and data.get("prompt_id") != self.prompt_id:
            return
        if kind == "progress":
            self.progress.append((data["node"], data["value"], data["max"]))
        elif kind == "executing" and data["node"]:
            self.ran.add(data["node"])
        elif kind == "executed" and data.get("output"):
            self.outputs[data["node"]] = data["output"]
        elif kind == "execution_error":
            self.error, self.ended = data, True
        elif kind == "execution_interrupted":
            self.interrupted = self.ended = True
        elif kind == "execution_success":
            self.ended = True


class WebSocket:
    """As much of RFC 6455 as reading a server's messages on loopback takes."""

    def __init__(self, port: int, path: str):
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=300)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._stream = self._socket.makefile("rb")
        assert b"101" in self._stream.readline()
        while self._stream.readline() not in (b"\r\n", b""):
            pass

    def __enter__(self) -> WebSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._socket.close()

    def receive(self) -> bytes | Json:
        """The next message: JSON, or the bytes of a preview."""
        whole, code = b"", 0
        while True:
            first, second = self._read(2)
            length = second & 0x7F
            if length == 126:
                (length,) = struct.unpack(">H", self._read(2))
            elif length == 127:
                (length,) = struct.unpack(">Q", self._read(8))
            data = self._read(length)
            if first & 0x0F in (8, 9, 10):
                assert first & 0x0F != 8, "the server closed the websocket"
                continue
            code = code or first & 0x0F
            whole += data
            if first & 0x80:
                return whole if code == 2 else json.loads(whole)

    def _read(self, count: int) -> bytes:
        data = self._stream.read(count)
        assert data is not None and len(data) == count, "the websocket ended"
        return data


def _bring_pack(target: Path) -> None:
    """A link to the pack, or a copy where the system lets not everyone make links, as Windows does not."""
    try:
        os.symlink(ROOT, target, target_is_directory=True)
    except OSError:
        shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(".*", "__pycache__", "demo", "runs"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
