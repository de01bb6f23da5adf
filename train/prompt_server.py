"""A language model behind an OpenAI-compatible server on the user's machine: llama.cpp, Ollama, LM Studio, vLLM."""

from __future__ import annotations

import ipaddress
import json
import math
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from http.client import HTTPException, HTTPMessage
from typing import IO, Any

from ..l2p_core.prompts.writer import TEMPERATURE, TOP_K, TOP_P, Request

Json = dict[str, Any]
REQUEST_SECONDS = 300.0
"""How long an answer may take; a model that is being loaded takes minutes."""
ANSWER_BYTES = 1 << 20
"""Maximum size of an answer."""
TOKENS = 400
"""Maximum tokens of an answer: more than a prompt takes, for models that always think a little."""
_REFUSAL_BYTES = 1 << 14  # of a server's explanation
_SHOWN = 200  # characters of it
_MODELS = 8  # that are named
_PAUSE_FIRST, _PAUSE_LAST = 0.5, 5.0  # seconds between attempts to reach a server that does not answer
_LOOK = 0.2  # seconds between checks whether the user wants to stop
_GRACE = 10.0  # seconds that a stop waits for the answers on their way

_EXTRAS: Json = {"top_k": TOP_K, "chat_template_kwargs": {"enable_thinking": False}}
"""Parameters of local servers beyond OpenAI's interface; dropped for a server that refuses them. The second keeps Qwen3
and similar models from thinking aloud."""


class _Unanswered(Exception):
    """The server gave no answer, and may give one later; the message says how, as what follows its address."""

    @classmethod
    def because(cls, reason: object) -> _Unanswered:
        return cls(f"does not answer ({reason}): start the server, or check the address.")


class ServerWriter:
    """A `Writer` of l2p_core.prompts.

    Args:
        address: such as http://127.0.0.1:8080, with or without /v1.
        model: its name there; None for the only one that the server has.
        temperature: of sampling.
        at_once: requests at a time. Only servers with as many slots profit.
        patience: seconds to wait for a server that does not answer.
        remote: whether the address may be of another machine.
        tokens: maximum of an answer.
        stopped: whether the user wants to stop.

    Raises:
        ValueError: for an unusable or remote address, a server that does not answer, or a model that it does not have.
    """

    def __init__(
        self,
        address: str,
        model: str | None = None,
        *,
        temperature: float = TEMPERATURE,
        at_once: int = 1,
        patience: float = 60,
        remote: bool = False,
        tokens: int = TOKENS,
        stopped: Callable[[], bool] = lambda: False,
    ):
        self._url = _base(address)
        if not remote:
            _check_local(self._url)
        self._opener = _opener(remote)
        self._patience, self._tokens, self._temperature = patience, tokens, temperature
        self._extras = dict(_EXTRAS)
        self._stopped = stopped
        self.at_once = at_once
        self._model = self._chosen(model)
        self.name = self._model

    def write(self, requests: Sequence[Request]) -> list[str]:
        """The model's answers; see `Writer`.

        Raises:
            KeyboardInterrupt: once `stopped` is true, if the answers do not come in a moment.
        """
        answers: list[Future[str]] = [Future() for _ in requests]
        for answer, request in zip(answers, requests, strict=True):
            # Not a pool's: Python would wait for those at its end.
            threading.Thread(target=self._answer_into, args=(answer, request), daemon=True).start()
        until = math.inf
        while wait(answers, timeout=_LOOK).not_done:
            if self._stopped():
                until = min(until, time.monotonic() + _GRACE)
            if time.monotonic() > until:
                raise KeyboardInterrupt
        return [answer.result() for answer in answers]

    def _answer_into(self, answer: Future[str], request: Request) -> None:
        try:
            answer.set_result(self._answer(request))
        except BaseException as error:
            answer.set_exception(error)

    def _answer(self, request: Request) -> str:
        body = {
            "model": self._model,
            "messages": [{"role": turn.role, "content": turn.text} for turn in request.turns],
            "temperature": self._temperature,
            "top_p": TOP_P,
            "max_tokens": self._tokens,
            "seed": request.seed,
            "stream": False,
        }
        extras = dict(self._extras)
        try:
            answer = self._call("/chat/completions", {**body, **extras})
        except urllib.error.HTTPError as error:
            if not extras or error.code not in (400, 422):
                raise self._refused(error) from error
            answer = self._plain(body)
        return self._text(answer)

    def _plain(self, body: Json) -> Json:
        """The answer without the extras; they are not sent again if this succeeds."""
        try:
            answer = self._call("/chat/completions", body)
        except urllib.error.HTTPError as error:
            raise self._refused(error) from error
        self._extras = {}
        return answer

    def _text(self, answer: Json) -> str:
        try:
            choice = answer["choices"][0]
            text = choice["message"].get("content") or ""
            if not isinstance(text, str):
                raise TypeError
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{self._url} does not answer as an OpenAI-compatible server does.") from error
        if not text.strip() and choice.get("finish_reason") == "length":
            raise ValueError(
                f"The model wrote no text within {self._tokens} tokens, because it thinks before it writes: switch "
                "thinking off in the server, or allow more with --tokens."
            )
        return text

    def _chosen(self, model: str | None) -> str:
        """The model to use, out of the server's list."""
        try:
            listed = self._call("/models")
            names = [str(entry["id"]) for entry in listed["data"]]
        except urllib.error.HTTPError as error:
            if error.code == 404 and model:
                return model  # a server without a list
            raise self._refused(error) from error
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self._url} does not answer as an OpenAI-compatible server does.") from error
        if model is None and len(names) == 1:
            return names[0]
        if model is None or (names and model not in names):
            shown = ", ".join(names[:_MODELS]) + (" and more" if len(names) > _MODELS else "")
            what = f"has no model {model!r}" if model else f"has {len(names)} models"
            raise ValueError(f"{self._url} {what}: name one of its own with --name ({shown or 'it lists none'}).")
        return model

    def _refused(self, error: urllib.error.HTTPError) -> ValueError:
        return ValueError(f"{self._url} {_refusal(error)}")

    def _call(self, path: str, body: Json | None = None) -> Json:
        """The JSON of an answer, for which this waits up to `patience` seconds.

        Raises:
            ValueError: if there is none.
            urllib.error.HTTPError: if the server refuses, with a code below 500.
        """
        until, pause = time.monotonic() + self._patience, _PAUSE_FIRST
        while True:
            try:
                return self._once(path, body)
            except _Unanswered as error:
                if time.monotonic() + pause > until:
                    raise ValueError(f"{self._url} {error}") from error
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE_LAST)

    def _once(self, path: str, body: Json | None) -> Json:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=REQUEST_SECONDS) as answer:
                content = _read(answer.read1, time.monotonic() + REQUEST_SECONDS)
        except urllib.error.HTTPError as error:
            if error.code >= 500:
                raise _Unanswered(_refusal(error)) from error
            raise
        except (OSError, HTTPException) as error:
            raise _Unanswered.because(getattr(error, "reason", None) or error or type(error).__name__) from error
        try:
            parsed = json.loads(content)
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            raise ValueError(f"{self._url} does not answer as an OpenAI-compatible server does.")
        return parsed


def _read(read: Callable[[int], bytes], until: float) -> bytes:
    """A body within the limits of size and time; a socket's own timeout restarts with every byte."""
    content = b""
    while piece := read(1 << 16):
        content += piece
        if len(content) > ANSWER_BYTES:
            raise ValueError(f"The server's answer is larger than {ANSWER_BYTES >> 20} MiB: it is not a prompt.")
        if time.monotonic() > until:
            raise _Unanswered.because(f"its answer takes longer than {REQUEST_SECONDS:.0f} seconds")
    return content


def _base(address: str) -> str:
    """The address with its path up to /v1."""
    url = (address if "://" in address else f"http://{address}").rstrip("/")
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number, or above 65535
        usable = False
    if not usable or parts.query or parts.fragment or parts.username:
        raise ValueError(f"{address!r} is not the address of a server: write it as http://127.0.0.1:8080.")
    return url if parts.path.rstrip("/").endswith("/v1") else f"{url}/v1"


def _check_local(url: str) -> None:
    """Refuse an address of another machine: prompts to rewrite are the user's own."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError) as error:
        raise ValueError(f"The server's name {host!r} is unknown: check the address.") from error
    if not all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found):
        raise ValueError(
            f"{host} is not this machine: start the server here, or add --remote if prompts may go to that machine."
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A local server must not send us to another machine."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None  # the answer is then an HTTPError of its code


def _opener(remote: bool) -> urllib.request.OpenerDirector:
    """Opens addresses without redirects; for this machine also without the proxies of the environment."""
    proxies = [] if remote else [urllib.request.ProxyHandler({})]
    return urllib.request.build_opener(_NoRedirect(), *proxies)


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        body = error.read(_REFUSAL_BYTES)
    except (OSError, HTTPException):
        body = b""
    return f"answers {error.code}: {_explanation(body) or error.reason}."


def _explanation(body: bytes) -> str:
    """A server's reason for a refusal, if one can be found."""
    try:
        answer = json.loads(body)
        said = answer.get("error", answer)
        said = said.get("message", said) if isinstance(said, dict) else said
    except (ValueError, AttributeError, RecursionError):
        said = body.decode(errors="replace")
    return " ".join(str(said).split())[:_SHOWN].rstrip(".")
