"""`l2p prompts`, with an OpenAI-compatible server of the test's own on loopback."""

from __future__ import annotations

import _thread
import json
import os
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fake_writers import prompt

from comfyui_l2p.l2p_core.dataset import prompts as lists
from comfyui_l2p.l2p_core.prompts.instructions import seed_of
from comfyui_l2p.l2p_core.prompts.scheme import slots
from comfyui_l2p.l2p_core.prompts.writer import Request, Turn
from comfyui_l2p.train import prompt_server
from comfyui_l2p.train.cli import main
from comfyui_l2p.train.prompt_server import ServerWriter

pytestmark = pytest.mark.usefixtures("unflushed")

Json = dict[str, Any]


class FakeServer:
    """A server with one model, which answers by `reply`: (code, body), the body JSON or raw bytes."""

    def __init__(self) -> None:
        self.models = ["tiny-llm"]
        self.asked: list[Json] = []
        self.reply: Callable[[Json], tuple[int, Any]] = lambda body: (200, completion(prompt(body["seed"])))
        self.wait = 0.0
        self.busiest = self._busy = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = self.path == "/v1/models"
                listed = {"data": [{"id": name} for name in server.models]}
                self._send(*((200, listed) if known else (404, {"error": {"message": "no such page"}})))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    server.asked.append(body)
                    server._busy += 1
                    server.busiest = max(server.busiest, server._busy)
                time.sleep(server.wait)
                with server._lock:
                    server._busy -= 1
                self._send(*server.reply(body))

            def _send(self, code: int, body: Any) -> None:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(code)
                if code == 302:
                    self.send_header("Location", "http://127.0.0.1:1/v1/models")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with suppress(ConnectionError):  # of a client that has given up
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def completion(text: str, reason: str = "stop") -> Json:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": reason}]}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    running = FakeServer()
    yield running
    running.close()


def request(seed: int = 7) -> Request:
    return Request((Turn("system", "Be brief."), Turn("user", "A fox.")), seed)


# The command.


def test_prompts_are_written_by_a_server(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # not for this machine
    folder = tmp_path / "my out"
    command = ["prompts", "write", str(folder), "--count", "20", "--server", server.address, "--seed", "3"]
    assert main(command) == 0
    written = lists.read(folder / "prompts.csv")
    assert written == [prompt(seed_of(3, slot, 0)) for slot in slots(20)]
    out, err = capsys.readouterr()
    assert "20 of 20 prompts, 20 of them written now." in out and "l2p synth SOURCE FOLDER --prompts" in out
    assert "prompts: 100%" in err
    if os.name == "posix":
        assert shlex.split(out.splitlines()[-1])[-1] == str(folder / "prompts.csv"), "it can be copied and pasted"
    body = server.asked[0]
    assert body["model"] == "tiny-llm" and body["temperature"] == 0.9 and not body["stream"]
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert main(command) == 0 and len(server.asked) == 20


def test_synth_takes_the_list_as_it_is(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prompts", "write", str(tmp_path / "out"), "--count", "3", "--server", server.address]) == 0
    capsys.readouterr()
    # The tiny source does not know these words: the list was read, and its first prompt handed on.
    assert main(["synth", "tiny", str(tmp_path / "data"), "--prompts", str(tmp_path / "out" / "prompts.csv")]) == 2
    assert "does not know the word" in capsys.readouterr().err


def test_several_at_once_write_the_same_list(server: FakeServer, tmp_path: Path) -> None:
    server.wait = 0.01
    options = ["--count", "12", "--server", server.address]
    assert main(["prompts", "write", str(tmp_path / "one"), *options]) == 0
    assert server.busiest == 1
    assert main(["prompts", "write", str(tmp_path / "four"), *options, "--at-once", "4"]) == 0
    assert 1 < server.busiest <= 4
    one, four = ((tmp_path / name / "prompts.csv").read_bytes() for name in ("one", "four"))
    assert one == four


def test_ctrl_c_keeps_what_is_written(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def reply(body: Json) -> tuple[int, Any]:
        if len(server.asked) == 4:
            _thread.interrupt_main()  # as Ctrl-C does
        return 200, completion(prompt(body["seed"]))

    server.reply = reply
    command = ["prompts", "write", str(tmp_path), "--count", "10", "--server", server.address]
    assert main(command) == 130
    assert "4 of 10 prompts, 4 of them written now. Run it again for the rest." in capsys.readouterr().out
    assert len(lists.read(tmp_path / "prompts.csv")) == 4
    assert main(command) == 0 and len(server.asked) == 10


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_server_that_does_not_answer_delays_a_stop_by_a_moment_only(
    at_once: int, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reply(body: Json) -> tuple[int, Any]:
        if len(server.asked) == 4 and not server.wait:
            server.wait = 20
            threading.Timer(0.5, _thread.interrupt_main).start()  # as Ctrl-C does
        return 200, completion(prompt(body["seed"]))

    server.reply = reply
    monkeypatch.setattr(prompt_server, "_GRACE", 0.1)
    options = ["--count", "20", "--server", server.address, "--at-once", str(at_once)]
    started = time.monotonic()
    assert main(["prompts", "write", str(tmp_path), *options]) == 130
    assert time.monotonic() < started + 20, "answers may take five minutes"
    assert len(lists.read(tmp_path / "prompts.csv")) == 4


def test_short_prompts_are_rewritten(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("# mine\na quiet orchard\na fox\n", encoding="utf-8")

    def reply(body: Json) -> tuple[int, Any]:
        short = body["messages"][1]["content"].rpartition("\n\n")[2]
        return 200, completion(f"{short.capitalize()} and {prompt(body['seed'])[:260]}, far away.")

    server.reply = reply
    command = ["prompts", "rewrite", str(tmp_path / "short.txt"), str(tmp_path / "out"), "--server", server.address]
    assert main(command) == 0
    assert [text.split(" and ")[0] for text in lists.read(tmp_path / "out" / "prompts.csv")] == [
        "A quiet orchard",
        "A fox",
    ]
    assert "skipped as a comment in short.txt: '# mine'." in capsys.readouterr().err


def test_a_list_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("\n".join([prompt(1), prompt(2), prompt(1), "a fox", "狐狸"]), encoding="utf-8")
    results = ["--report", str(tmp_path / "r.html"), "--output", str(tmp_path / "good.csv")]
    assert main(["prompts", "check", str(path), *results]) == 0
    out = capsys.readouterr().out
    for line in (
        "prompts                         | 5",
        "too short  | 2",
        "repeats an earlier prompt",
        "| 1",
        "without a problem",
    ):
        assert " ".join(line.split()) in " ".join(out.split()), out
    assert lists.read(tmp_path / "good.csv") == [prompt(1), prompt(2)]
    assert "2 of 5 prompts are without a problem" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert main(["prompts", "check", str(path), *results]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["prompts", "check", str(path), *results, "--overwrite"]) == 0
    path.write_text(f"# mine\na fox\n{prompt(1)}\n", encoding="utf-8")
    assert main(["prompts", "check", str(path)]) == 0
    found = capsys.readouterr()
    assert f"Characters: 5 to {len(prompt(1))}, median 5." in found.out
    assert "skipped as a comment in mine.txt" in found.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["write", "{}", "--count", "1"], "one of the arguments --model --server is required"),
        (["write", "{}", "--server", "ftp://127.0.0.1"], "is not the address of a server"),
        (["write", "{}", "--server", "127.0.0.1:99999"], "is not the address of a server"),
        (["write", "{}", "--server", "http://192.0.2.1:80"], "192.0.2.1 is not this machine: start the server here"),
        (["write", "{}", "--server", "http://0.0.0.0:80"], "0.0.0.0 is not this machine"),
        (["write", "{}", "--server", "http://127.0.0.1:1", "--patience", "0"], "does not answer (.*refused"),
        (["write", "{}", "--server", "http://127.0.0.1:1", "--download"], "belong to --model"),
        (["write", "{}", "--temperature", "0", "--server", "x"], "must be above 0"),
        (["check", "{}/gone.txt"], "cannot be read"),
        (["check", "{}/gone.txt", "--report", "r.txt"], "must end in .html"),
        (["rewrite", "{}/gone.txt", "{}/out", "--server", "http://127.0.0.1:1"], "cannot be read"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["prompts", *(argument.format(tmp_path) for argument in arguments)])
    except SystemExit as stop:
        code = int(stop.code or 0)
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1
    assert all(part in error for part in sentence.split(".*")), error
    assert not (tmp_path / "journal.jsonl").exists()


# The server's client.


def test_the_model_is_the_only_one_or_named(server: FakeServer) -> None:
    assert ServerWriter(f"{server.address}/v1/", "tiny-llm").name == "tiny-llm"
    assert ServerWriter(server.address.removeprefix("http://")).name == "tiny-llm"
    with pytest.raises(ValueError, match=r"has no model 'gpt': name one of its own with --name \(tiny-llm\)"):
        ServerWriter(server.address, "gpt")
    server.models = [f"model-{number}" for number in range(20)]
    with pytest.raises(ValueError, match="has 20 models: name one .*model-7 and more"):
        ServerWriter(server.address)
    server.models = []
    with pytest.raises(ValueError, match="has 0 models: .*it lists none"):
        ServerWriter(server.address)
    assert ServerWriter(server.address, "hidden").name == "hidden"


def test_a_server_that_refuses_what_only_others_know_is_asked_without(server: FakeServer) -> None:
    def strict(body: Json) -> tuple[int, Any]:
        if "top_k" in body:
            return 400, {"error": {"message": "unknown field top_k"}}
        return 200, completion("a fox")

    server.reply = strict
    writer = ServerWriter(server.address)
    assert writer.write([request()]) == ["a fox"] == writer.write([request()])
    assert ["top_k" in body for body in server.asked] == [True, False, False]


@pytest.mark.parametrize(
    ("code", "body", "sentence"),
    [
        (400, {"error": {"message": "the context is too long."}}, "answers 400: the context is too long"),
        (401, {"error": "no key"}, "answers 401: no key"),
        (404, b"<html>", "answers 404: <html>"),
        (302, b"", "answers 302: Found"),
        (500, {"error": {"message": "out of memory"}}, "answers 500: out of memory"),
        (503, b"", "answers 503: Service Unavailable"),
        (200, b"<html>", "does not answer as an OpenAI-compatible server does"),
        (200, [1], "does not answer as an OpenAI-compatible server does"),
        (200, {"choices": []}, "does not answer as an OpenAI-compatible server does"),
        (200, {"choices": [{"message": {"content": [1]}}]}, "does not answer as an OpenAI-compatible server does"),
        (200, completion("", "length"), "wrote no text within 400 tokens, because it thinks"),
        (200, b"[" * (prompt_server.ANSWER_BYTES + 10), "larger than 1 MiB"),
        (200, b"[" * 100_000, "does not answer as an OpenAI-compatible server does"),
    ],
)
def test_answers_that_are_none(server: FakeServer, code: int, body: Any, sentence: str) -> None:
    server.reply = lambda _: (code, body)
    with pytest.raises(ValueError) as refused:
        ServerWriter(server.address, patience=0).write([request()])
    assert sentence in str(refused.value)


def test_a_server_that_is_slow_is_not_waited_for_forever(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ServerWriter(server.address, patience=0)
    monkeypatch.setattr(prompt_server, "REQUEST_SECONDS", 0.05)
    server.wait = 0.3
    with pytest.raises(ValueError, match="does not answer .*timed out"):
        writer.write([request()])


def test_a_drip_is_no_answer() -> None:
    with pytest.raises(Exception, match="its answer takes longer than 300 seconds"):
        prompt_server._read(lambda _: b"x", time.monotonic() - 1)


def test_a_server_that_comes_back_is_waited_for(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_server, "_PAUSE_FIRST", 0.01)
    codes = iter([503, 500, 200])
    server.reply = lambda _: (next(codes), completion("a fox"))
    assert ServerWriter(server.address, patience=5).write([request()]) == ["a fox"]


def test_another_machine_is_asked_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"lan": "192.0.2.1", "both": "127.0.0.1"}

    def resolve(host: str, _: Any) -> list[Any]:
        more = [(0, 0, 0, "", ("2001:db8::1", 0, 0, 0))] if host == "both" else []
        return [(0, 0, 0, "", (found[host], 0)), *more]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    for host in found:
        with pytest.raises(ValueError, match=f"{host} is not this machine"):
            prompt_server._check_local(f"http://{host}:80/v1")
