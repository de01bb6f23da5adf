"""How commands end: Ctrl-C, signals that end a process, and output that nobody reads or that cannot be written."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_checkpoints

from comfyui_l2p.l2p_core.device.accelerator import CPU
from comfyui_l2p.train import evaluate_benchmark
from comfyui_l2p.train.benchmark import depth, process
from comfyui_l2p.train.cli import main
from comfyui_l2p.train.interrupt import deferred_interrupt, terminable

pytestmark = pytest.mark.usefixtures("unflushed")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_checkpoints.write(tiny_checkpoints.weights(), tmp_path / "source.safetensors")


def run_cli(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "comfyui_l2p.train", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("moment", ["train.cli.build_parser", "train.inspect_file.open_checkpoint"])
def test_interrupt_is_one_line(
    moment: str, monkeypatch: pytest.MonkeyPatch, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"comfyui_l2p.{moment}", interrupted)
    assert main(["inspect", str(source)]) == 130
    assert capsys.readouterr().err == "l2p: stopped.\n"


ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell starts its background jobs with SIGINT ignored, nohup with SIGHUP, and tests may be one."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ENDING}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_that_waits_for_a_step_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), deferred_interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        assert capfd.readouterr().err.split("\n")[1:] == [
            "Stopping after the current step. Press Ctrl-C again to stop at once.",
            "",
        ]
        signal.raise_signal(signal.SIGINT)
    assert not capfd.readouterr().err


@pytest.mark.parametrize("number", ENDING, ids=str)
@pytest.mark.usefixtures("interruptible")
def test_a_scheduler_or_a_closed_terminal_waits_for_a_step(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    """They come more than once: torchrun passes on what its processes have received themselves."""
    with deferred_interrupt() as interrupt:
        for _ in range(3):
            signal.raise_signal(number)
        assert interrupt.requested and capfd.readouterr().err.count("Stopping after the current step") == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.raise_signal(number)  # still, until the process has ended


@pytest.mark.usefixtures("interruptible")
def test_what_is_cleaned_up_after_a_signal_is_not_interrupted_by_the_next() -> None:
    """A closed terminal sends SIGHUP itself, and so does its shell."""
    cleaned = False
    with pytest.raises(KeyboardInterrupt), terminable():
        try:
            signal.raise_signal(ENDING[0])
        finally:
            for number in ENDING:
                signal.raise_signal(number)
            cleaned = True
    signal.raise_signal(ENDING[0])
    assert cleaned


@pytest.mark.usefixtures("interruptible")
def test_signals_are_handled_as_before_when_none_has_come() -> None:
    with terminable(), deferred_interrupt():
        pass
    assert [signal.getsignal(number) for number in ENDING] == [signal.SIG_DFL] * len(ENDING)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_in_the_last_step_of_a_run_ends_what_would_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finished(*_: object, **__: object) -> SimpleNamespace:
        signal.raise_signal(signal.SIGTERM)
        return SimpleNamespace(finished=True, folder=None)

    monkeypatch.setattr("comfyui_l2p.l2p_core.run.loop.train", finished)
    with pytest.raises(KeyboardInterrupt):
        depth.train(depth.recipe(tmp_path, tmp_path / "start.safetensors", 2, 8), tmp_path)


@pytest.mark.usefixtures("interruptible")
def test_signals_that_nohup_has_the_process_ignore_stay_ignored() -> None:
    signal.signal(ENDING[-1], signal.SIG_IGN)
    with deferred_interrupt() as interrupt:
        signal.raise_signal(ENDING[-1])
        assert not interrupt.requested
    assert signal.getsignal(ENDING[-1]) == signal.SIG_IGN


@pytest.mark.usefixtures("interruptible")
def test_a_command_that_is_terminated_leaves_no_partial_file(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def terminated(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("comfyui_l2p.l2p_core.files.atomic.os.replace", terminated)
    before = sorted(tmp_path.iterdir())
    assert main(["convert", str(source), str(tmp_path / "l2p.safetensors"), "--variant", "1k"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "l2p: stopped."
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(os.name == "nt", reason="a shell with tee")
def test_a_run_saves_although_nobody_reads_its_output_any_more(tmp_path: Path) -> None:
    """Ctrl-C at `l2p train … 2>&1 | tee log` ends tee at once."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[model]\nbase = "tiny"\nhead_width = 0.0625\n[data]\nkind = "tiny"\nimages = 2\nsteps = 1\nbatch_size = 1\n'
        '[training]\nsteps = 100000\nprecision = "fp32"\n[watch]\nsave_every = 100000\nmontage_every = 100000\n',
        encoding="utf-8",
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    with run_cli("train", recipe, "--output", tmp_path / "run", env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        assert process.stderr and process.stdout
        while process.poll() is None and not metrics.exists():
            os.read(process.stderr.fileno(), 1 << 16)
        process.stderr.close()
        process.stdout.close()
        seen = len(metrics.read_text(encoding="utf-8").splitlines())
        while process.poll() is None and len(metrics.read_text(encoding="utf-8").splitlines()) < seen + 20:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 130
    assert (tmp_path / "run" / "state.safetensors").exists()


def test_a_benchmark_stops_while_it_encodes_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Source:
        def __init__(self, *_: object, **__: object) -> None: ...

        def fill(self, captions: list[str], progress: Callable[[int, int], None]) -> Any:
            progress(1, len(captions))
            return SimpleNamespace(read=None)

    files = SimpleNamespace(published=SimpleNamespace(max_tokens=8))
    for name, value in {"is_tiny": lambda _: False, "encoder_files": lambda *_: files, "CaptionSource": Source}.items():
        monkeypatch.setattr(evaluate_benchmark, name, value)
    monkeypatch.setattr("comfyui_l2p.train.text_encoder.identity", lambda _: "an encoder")
    sampler: Any = SimpleNamespace(base=None, config=None)
    encode = evaluate_benchmark._captions(argparse.Namespace(), sampler, [])
    made: Any = SimpleNamespace(beside=tmp_path)
    encode(CPU, made, lambda: False)
    with pytest.raises(KeyboardInterrupt):
        encode(CPU, made, lambda: True)


@pytest.mark.skipif(os.name == "nt", reason="a process is looked for by its number")
@pytest.mark.usefixtures("interruptible")
def test_a_measurement_that_is_interrupted_leaves_no_process(tmp_path: Path) -> None:
    number = tmp_path / "number"

    def stop() -> None:
        while not (number.exists() and number.read_text(encoding="ascii")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    work = f"import os, time; open({str(number)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt), terminable():
        process.run_module("timeit", "-n", "1", "-r", "1", work)
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text(encoding="ascii")), 0)


def test_a_command_works_without_standard_streams(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `>&- 2>&-`, and under pythonw; a progress bar is drawn."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["convert", str(source), str(tmp_path / "l2p.safetensors"), "--variant", "1k"]) == 0
    assert (tmp_path / "l2p.safetensors").exists()
    assert sys.stdout is None and sys.stderr is None


@pytest.mark.skipif(os.name == "nt", reason="a shell that closes streams")
def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """The note on Ctrl-C, which is written to standard error by its number, would end in that file."""
    code = (
        "import signal\n"
        "from comfyui_l2p.train.interrupt import deferred_interrupt\n"
        "from comfyui_l2p.train.streams import patient_streams\n"
        "with patient_streams(), open('model', 'wb') as file, deferred_interrupt():\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
    )
    done = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, code], cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert not (tmp_path / "model").read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is full, on Linux")
def test_results_that_cannot_be_written_are_said_to_be_lost(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["inspect", str(source)]) == 2
    assert capsys.readouterr().err == "l2p: the output could not be written: No space left on device.\n"


@pytest.mark.usefixtures("interruptible")
def test_a_stop_is_told_although_nobody_reads_the_output(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C at `l2p … | tee log` ends tee, and what was printed before is still in a buffer."""

    def stopped(*_: object) -> None:
        print("some progress")
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("comfyui_l2p.train.inspect_file.open_checkpoint", stopped)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["inspect", str(source)]) == 130
    assert capsys.readouterr().err == "l2p: stopped.\n"


def test_a_reader_that_has_seen_enough_is_no_mistake(source: Path) -> None:
    with run_cli("inspect", "--keys", source) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0 and not errors
