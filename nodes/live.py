"""What the frontend shows of a training run while it goes: sent to it a few times a second, and kept for a page that
is opened or reloaded later."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..l2p_core.run.live import LossCurves, sentence
from ..l2p_core.run.metrics import RunMetrics
from .routes import running_server
from .run_files import served

EVENT = "l2p.training"
_SECONDS = 0.5  # between messages at least
_KEPT = 16  # nodes whose last state is kept

_states: dict[str, dict[str, Any]] = {}


class Live:
    """One run's state in one node.

    Args:
        node_id: the node's, as the host names it.
        run: the run's name.

    Attributes:
        state: everything that the frontend draws, whole in every message, so that none is missed.
    """

    def __init__(self, node_id: str, run: str):
        self.curves = LossCurves()
        self.state: dict[str, Any] = {
            "node": node_id,
            "run": run,
            "status": "preparing",
            "text": "Preparing",
            "notes": [],
            "montage": None,
            "curves": self.curves.as_json(),
        }
        self._last = 0.0
        _states.pop(node_id, None)
        while len(_states) >= _KEPT:
            _states.pop(next(iter(_states)))
        _states[node_id] = self.state
        self.send()

    @property
    def is_empty(self) -> bool:
        """Whether no step has been shown."""
        return not self.curves.as_json()["steps"]

    def work(self, text: str, done: int, total: int) -> None:
        """Preparation has come so far."""
        self._update(text=f"{text[:1].upper()}{text[1:]}: {done / max(1, total):.0%}")

    def step(self, metrics: RunMetrics) -> None:
        """A step has been done."""
        self.curves.add(metrics.step, metrics.sigma_loss, metrics.sigma_count)
        self._update(status="training", text=sentence(metrics))

    def montage(self, step: int, path: Path) -> None:
        """The montage of a step has been written."""
        self.state["montage"] = {"step": step, **served(path)}
        self.send()

    def note(self, text: str) -> None:
        """A sentence that the user should read."""
        self.state["notes"] = [*self.state["notes"], text]
        self.send()

    def end(self, status: str, text: str) -> None:
        """The run is over: "finished", "stopped" or "failed"."""
        self.state |= {"status": status, "text": text}
        self.send()

    def send(self) -> None:
        """Tell the frontend, whatever was told it when."""
        self._last = time.monotonic()
        self.state["curves"] = self.curves.as_json()
        if running_server() is not None:
            # A copy: it is made into JSON in another thread.
            running_server().send_sync(EVENT, dict(self.state))

    def _update(self, **values: str) -> None:
        self.state |= values
        if time.monotonic() - self._last >= _SECONDS:
            self.send()


def last_states() -> list[dict[str, Any]]:
    """The states of the last runs."""
    return list(_states.values())
