"""The frontend's view of a training run: sent a few times per second during the run, and kept for a page that is opened
or reloaded later; after a restart of the server it is read from the run's folder."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...l2p_core.files.units import counted
from ...l2p_core.run.folder import RunFolder, montage_step
from ...l2p_core.run.live import LossCurves, arguments_of, sentence
from ...l2p_core.run.metrics import RunMetrics, read_metrics
from ..folders.run_files import run_folder, served
from .server import running_server

EVENT = "l2p.training"
_SECONDS = 0.5  # minimum between messages
_KEPT = 16  # nodes whose last state is kept

_states: dict[str, dict[str, Any]] = {}


class Live:
    """One run's state in one node.

    Args:
        node_id: the node's, as the host names it.
        run: the run's name.

    Attributes:
        state: everything that the frontend draws, complete in every message. Until the first step it shows the folder's
            content, which a refused run leaves unchanged.
    """

    def __init__(self, node_id: str, run: str):
        self.curves: LossCurves | None = None
        self._notes: list[str] = []
        self._forecast = ""
        self.state = saved_state(run) | {"node": node_id, "status": "preparing", "text": "Preparing"}
        self._last = 0.0
        _states.pop(node_id, None)
        while len(_states) >= _KEPT:
            _states.pop(next(iter(_states)))
        _states[node_id] = self.state
        self.send()

    @property
    def is_empty(self) -> bool:
        """Whether the run has shown no step of its own."""
        return self.curves is None

    def begin(self, earlier: Iterable[Mapping[str, Any]]) -> None:
        """Show the steps made before this start (lines of metrics.jsonl) in place of the folder's content."""
        self.curves = LossCurves()
        for line in earlier:
            self.curves.add(*arguments_of(line))

    def work(self, text: str, done: int, total: int) -> None:
        """Preparation has progressed."""
        self._update(text=f"{text[:1].upper()}{text[1:]}: {done / max(1, total):.0%}")

    def step(self, metrics: RunMetrics) -> None:
        """Show a finished step; its status says how long the rest takes."""
        assert self.curves is not None
        self._forecast = ""
        self.curves.add(metrics.step, metrics.sigma_loss, metrics.sigma_count)
        self._update(status="training", text=sentence(metrics))

    def montage(self, path: Path) -> None:
        """A montage has been written."""
        self.state["montage"] = shown_montage(path)
        self.send()

    def note(self, text: str) -> None:
        """Show a sentence that the user should read."""
        self._notes.append(text)
        self.send()

    def forecast(self, text: str) -> None:
        """Show the expected duration, as the last sentence until the first step or the end."""
        self._forecast = text
        self.send()

    def end(self, status: str, text: str) -> None:
        """Show the end of the run: "finished", "stopped" or "failed"."""
        self._forecast = ""
        self.state |= {"status": status, "text": text}
        self.send()

    def send(self) -> None:
        """Send the state to the frontend, regardless of when the last one was sent."""
        self._last = time.monotonic()
        if self.curves is not None:
            self.state["curves"] = self.curves.as_json()
        self.state["report"] = report_of(self.state["run"]) is not None
        self.state["notes"] = [*self._notes, *filter(None, [self._forecast])]
        if running_server() is not None:
            # A copy, because another thread converts it to JSON.
            running_server().send_sync(EVENT, dict(self.state))

    def _update(self, **values: str) -> None:
        self.state |= values
        if time.monotonic() - self._last >= _SECONDS:
            self.send()


def saved_state(run: str) -> dict[str, Any]:
    """The state of a run from its folder, without a node; its status is "none" if there is no run."""
    folder = RunFolder(run_folder(run))
    lines = read_metrics(folder.metrics) if folder.metrics.is_file() else []
    curves = LossCurves()
    for line in lines:
        curves.add(*arguments_of(line))
    montages = folder.montages()
    return {
        "run": run,
        "status": "saved" if lines else "none",
        "text": _where(lines[-1], folder.delta.is_file()) if lines else "Not trained yet",
        "notes": [],
        "montage": shown_montage(montages[-1]) if montages else None,
        "report": folder.report.is_file(),
        "curves": curves.as_json(),
    }


def _where(last: Mapping[str, Any], finished: bool) -> str:
    if finished and last["step"] >= last["steps"]:
        return f"Finished after {counted(last['step'], 'step')}"
    return f"Stopped after {last['step']} of {last['steps']} steps; run it again to resume from the last save."


def shown_montage(path: Path) -> dict[str, Any]:
    """The parameters with which the frontend requests a montage."""
    return {"step": montage_step(path), **served(path)}


def last_states() -> list[dict[str, Any]]:
    """The states of the last runs."""
    return list(_states.values())


def state_of(run: str) -> dict[str, Any]:
    """The state of a run: the last one sent, otherwise from its folder.

    Raises:
        ValueError: for a name that no run can have.
    """
    known = [state for state in _states.values() if state["run"] == run]
    return known[-1] if known else saved_state(run)


def report_of(run: str) -> Path | None:
    """A run's report; None if it does not exist.

    Raises:
        ValueError: for a name that no run can have.
    """
    report = RunFolder(run_folder(run)).report
    return report if report.is_file() else None
