"""The GPU benchmark: its quick check runs every row of the full run, on the CPU and on the simulated device."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import golden_vectors as golden
import pytest
import tiny_checkpoints
import torch

from comfyui_l2p.l2p_core.device import accelerator
from comfyui_l2p.l2p_core.memory.plan import plan
from comfyui_l2p.train.benchmark import (
    gpu,
    gpu_golden,
    gpu_measure,
    gpu_report,
    gpu_rows,
    gpu_training,
    gpu_worker,
)
from comfyui_l2p.train.benchmark.gpu_measure import Bench, _Event
from comfyui_l2p.train.benchmark.gpu_scale import FULL, QUICK
from comfyui_l2p.train.benchmark.published import published_velocity

ACCELERATOR = Path(__file__).with_name("accelerator")
sys.path.insert(0, str(ACCELERATOR))

import simulated  # noqa: E402

CPU = torch.device("cpu")
SIMULATED = simulated.why_not() is None
KEYS = [row.key for part in gpu_rows.PARTS for row in part.measurements]


def bench(**changes: Any) -> Bench:
    values = {"device": CPU, "scale": QUICK, "model": None, "deadline": time.monotonic() + 600, "outputs": {}}
    return Bench(**{**values, **changes})


def measured(output: Path, device: str, env: dict[str, str], *parts: str) -> dict[str, dict[str, Any]]:
    """What the command finds in its quick check."""
    command = ["benchmark", "gpu", "--quick", "--device", device, "--output", str(output)]
    command += ["--parts", ",".join(parts)] if parts else []
    subprocess.run(
        [sys.executable, "-m", "comfyui_l2p.train", *command],
        env={**os.environ, **env},
        check=True,
        capture_output=True,
    )
    found: dict[str, Any] = json.loads((output / "gpu.json").read_text(encoding="utf-8"))
    report = (output / "gpu.md").read_text(encoding="utf-8")
    assert all(found[name] and found[name] in report for name in ("device", "software")), "whatever the parts are"
    rows: dict[str, dict[str, Any]] = found["rows"]
    return rows


def check(rows: dict[str, dict[str, Any]], keys: list[str]) -> None:
    assert list(rows) == keys, "the quick check has the rows of the full run"
    assert {key: row["failed"] for key, row in rows.items() if "failed" in row} == {}
    numbers = {name for row in rows.values() for name, value in row.items() if isinstance(value, (int, float))}
    assert numbers <= gpu_report.UNITS.keys()
    for key, row in rows.items():
        if "fp32" in key:
            assert row["error"] < 1e-5, key
        elif "error" in row:
            assert row["error"] < 0.05, key
        if key.startswith(("sampling", "training", "head")):
            assert row["ms"] > 0 and row["predicted" if "published" not in key else "ms"] > 0, key
        if key.startswith("training"):
            assert row["kernels"] > 0 and row["items"] > 0 and row["after"] > 0, key


def test_quick_check_on_the_cpu(tmp_path: Path) -> None:
    # The simulated device runs every part; compiling on both would take a minute more.
    parts = ["card", "golden", "head"] if SIMULATED else [part.name for part in gpu_rows.PARTS]
    keys = [row.key for part in gpu_rows.chosen(parts) for row in part.measurements]
    check(measured(tmp_path, "cpu", {}, *parts), keys)
    assert all(f"| {key} " in (tmp_path / "gpu.md").read_text(encoding="utf-8") for key in keys)


@pytest.mark.skipif(not SIMULATED, reason=str(simulated.why_not()))
def test_quick_check_on_the_simulated_device(tmp_path: Path) -> None:
    simulated.built()
    rows = measured(tmp_path, simulated.NAME, {"PYTHONPATH": str(ACCELERATOR)})
    check(rows, KEYS)
    for key, row in rows.items():
        if key.startswith(("sampling", "training", "head")):
            assert row["peak"] > 0 and row["reserved"] >= row["peak"], key


def test_both_scales_have_every_variant() -> None:
    assert FULL.sides.keys() == QUICK.sides.keys()
    assert len(set(KEYS)) == len(KEYS)


@pytest.mark.parametrize("name", ["dit_16", "dit_160"])
def test_the_published_way_is_the_published_codes(name: str) -> None:
    model, cases, against = gpu_golden.published(golden.GOLDEN / f"{name}.safetensors")
    assert "published" in against
    multiple, checked = model.config.size_multiple, 0
    for case in cases:
        if case.pixels.shape[1] % multiple or case.pixels.shape[2] % multiple:
            continue  # ours pads these, the reference does not
        velocity = published_velocity(model, case.pixels[None], torch.tensor([case.sigma]), case.caption)[0]
        assert golden.relative_error(velocity[:, :: case.stride, :: case.stride], case.velocity) < 1e-5
        checked += 1
    assert checked


def test_golden_rows_use_the_published_outputs_of_a_checkout() -> None:
    scene = gpu_golden.Golden("1k").make(bench(scale=FULL))
    found = gpu_golden.InPrecision(torch.float32, tf32=False)(bench(), scene)
    assert found["error"] < 1e-5 and found["note"] == "against the published code"


def test_a_profile_tells_how_much_copying_is_hidden() -> None:
    events = [
        _Event("kernel_a", 0, 1000, True),
        _Event("Memcpy HtoD (Pinned -> Device)", 500, 1500, True),
        _Event("Memcpy DtoH (Device -> Pinned)", 600, 1000, True),
        _Event("kernel_b", 900, 1200, True),
        _Event("Memset (Device)", 1200, 1300, True),
        _Event("aten::mm", 0, 5000, False),
        _Event("aten::_local_scalar_dense", 0, 1, False),
        _Event("cudaStreamSynchronize", 0, 1, False),
        _Event("aten::_local_scalar_dense", 2000, 2001, False),  # of a tensor in RAM
        _Event("cudaEventSynchronize", 1990, 2010, False),  # of another thread
    ]
    found = gpu_measure.of_events(events)
    assert (found["kernels"], found["copies"], found["waits"], found["items"]) == (2, 2, 2, 1)
    assert (found["copy_ms"], found["kernel_ms"], found["hidden"]) == (1.0, 1.2, 0.7)
    assert found["longest"][0] == {"kernel": "kernel_a", "count": 1, "ms": 1.0}
    assert "1.00 ms, 1 times: `kernel_a`" in gpu_report.markdown(
        {"when": "now", "version": "1", "quick": False, "model": None, "seconds": 1}, {"a step": found}
    )


def test_without_a_device_operations_stand_for_kernels() -> None:
    found = gpu_measure.counted(bench(), lambda: (torch.ones(3) + torch.ones(3)).sum().item())
    assert found["kernels"] > 2 and found["items"] == 1 and found["waits"] == 0


def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
    """Let a program stand in for the process that measures."""
    (tmp_path / "stand_in_worker.py").write_text("import json, sys, time, os\n" + body, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_worker, "__name__", "stand_in_worker")


def test_the_report_survives_crashes_and_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    body = """
request = json.loads(sys.stdin.readline())
for key in request["rows"]:
    print("a library says something")
    print(json.dumps({"l2p": {"begins": key, "limit": 30}}), flush=True)
    if "software" in key:
        sys.exit("killed by something")
    print(json.dumps({"l2p": {"row": key, "figures": {"ms": 2.0, "rounds": 1}}}), flush=True)
"""
    worker(monkeypatch, tmp_path, body)
    found = gpu.benchmark_gpu(tmp_path / "out", parts=["card"], quick=True)
    assert "code 1: killed by something" in found["card: software"]["failed"]
    assert all(row.get("ms") == 2.0 for key, row in found.items() if key != "card: software")
    assert "killed by something" in (tmp_path / "out" / "gpu.md").read_text(encoding="utf-8")


def test_a_process_that_cannot_start_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker(monkeypatch, tmp_path, 'open("starts", "a").write("x"); sys.exit("broken installation")')
    monkeypatch.chdir(tmp_path)
    found = gpu.benchmark_gpu(tmp_path / "out", parts=["card"], quick=True)
    assert all("broken installation" in row["failed"] for row in found.values())
    assert (tmp_path / "starts").read_text(encoding="utf-8") == "x", "started once"


def test_a_row_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    body = """
request = json.loads(sys.stdin.readline())
for key in request["rows"]:
    print(json.dumps({"l2p": {"begins": key, "limit": 0.2}}), flush=True)
    if "bf16 product" in key:
        time.sleep(60)
    print(json.dumps({"l2p": {"row": key, "figures": {"value": "done"}}}), flush=True)
"""
    worker(monkeypatch, tmp_path, body)
    found = gpu.benchmark_gpu(tmp_path / "out", parts=["card"], quick=True)
    assert "without an answer" in found["card: bf16 product"]["failed"]
    assert sum("failed" in row for row in found.values()) == 1


def test_a_row_that_fails_is_named_and_the_next_follows() -> None:
    def fails(bench: Bench, made: object) -> dict[str, Any]:
        raise RuntimeError("no kernel image\nwith details")

    scene = gpu_worker._Scene(bench())
    figures, failed = gpu_worker._figures(bench(), gpu_rows.Measurement("card", "broken", fails), scene)
    assert failed and figures["failed"] == "RuntimeError: no kernel image" and "with details" in figures["details"]


def test_a_result_that_is_not_finite_is_a_failure_and_no_number(tmp_path: Path) -> None:
    row = gpu_rows.Measurement("card", "broken", lambda bench, made: {"ms": 1.0, "error": math.nan})
    figures, _ = gpu_worker._figures(bench(), row, gpu_worker._Scene(bench()))
    assert figures == {"ms": 1.0, "failed": gpu_worker.NOT_FINITE}


def test_offloading_that_the_ram_does_not_hold_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_training, "plan", lambda *given, device_type: plan(*given, device_type="cuda"))
    monkeypatch.setattr(gpu_training, "free_memory_and_swap", lambda: 1000)
    with pytest.raises(ValueError, match=r"needs .* GB of RAM, and 1e-06 GB are free"):
        gpu_training.Training("z-image-1k-16gb", accumulate=2)(bench(), None)


def test_a_part_whose_time_is_over_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    part = gpu_rows.chosen(["card"])[0]
    assert gpu_worker._measure(bench(deadline=time.monotonic() - 1), part, {row.key for row in part.measurements})
    said = list(gpu_worker.messages(iter(capsys.readouterr().out.splitlines())))
    assert [message["figures"]["failed"] for message in said] == [gpu_worker.CUT] * len(part.measurements)


def test_the_ratio_is_measured_over_predicted() -> None:
    assert gpu_report.with_ratio({"beyond": 3, "predicted": 2})["ratio"] == 1.5
    assert "ratio" not in gpu_report.with_ratio({"predicted": 2})


def test_without_a_gpu_the_large_model_is_not_measured_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "default_device", lambda: torch.device("cpu"))
    with pytest.raises(ValueError, match="no GPU here, and the 6B model on a CPU takes hours.*--quick.*--device cpu"):
        gpu.benchmark_gpu(tmp_path / "never", parts=["card"])
    assert not (tmp_path / "never").exists()


def test_mistakes(tmp_path: Path) -> None:
    weights = tiny_checkpoints.weights(tiny_checkpoints.pixel_config())
    del weights["layers.0.attention.qkv.weight"]
    file = tiny_checkpoints.write(weights, tmp_path / "incomplete.safetensors")
    with pytest.raises(ValueError, match="is incomplete: 'layers.0.attention.qkv.weight' is missing"):
        gpu.benchmark_gpu(tmp_path / "never", parts=["card"], quick=True, model=file)
    assert not (tmp_path / "never").exists()
    with pytest.raises(ValueError, match="warp"):
        gpu.benchmark_gpu(Path("never"), parts=["card"], device="warp")
    with pytest.raises(ValueError, match="no part 'heads'.*golden"):
        gpu_rows.chosen(["heads"])
    assert "golden:" in gpu.listed() and all(key.split(": ", 1)[1] in gpu.listed() for key in KEYS)
