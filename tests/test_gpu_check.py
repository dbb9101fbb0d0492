"""benchmarks/gpu_check.py without a GPU: whatever is missing, fails or hangs, the rest runs and the JSON is written."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import resens_fast as rf
from benchmarks import gpu_check, gpu_peers, gpu_values
from benchmarks.gpu_values import Missing
from resens_fast.kernels import check as kernels

from .cuda_host import ROOT


@pytest.fixture
def check(tmp_path: Path) -> Any:
    made = gpu_check.Check(argparse.Namespace(out=str(tmp_path / "out"), data=None, seconds=500.0))
    yield made
    made.watchdog.cancel()


def saved(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "gpu_check.json").read_text())
    return found


def test_without_a_gpu_every_section_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--out", str(tmp_path)]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environ)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "nothing was checked"), done.stderr
    states = {name: (row["state"], row.get("reason", "")) for name, row in saved(tmp_path)["sections"].items()}
    assert states.pop("environment")[0] == "ok"
    assert len(states) >= 25
    assert all(state == "missing" for state, _ in states.values()), states
    assert "not done: build: torch sees no CUDA device" in done.stdout


def test_a_section_that_fails_or_has_no_time_left_is_reported_and_the_next_runs(check: Any, tmp_path: Path) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    check.section("broken", broken, 0)
    check.section("late", lambda: 1, 10_000)
    check.section("fine", lambda: "done", 0)
    check.finish()
    result = saved(tmp_path / "out")
    assert {name: row["state"] for name, row in result["sections"].items()} == {
        "broken": "failed", "late": "missing", "fine": "ok",
    }  # fmt: skip
    assert "not done: broken: RuntimeError: CUDA error: an illegal memory access" in result["table"]
    assert "Traceback" in result["sections"]["broken"]["trace"]


def test_a_section_that_hangs_ends_the_script_with_everything_written(tmp_path: Path) -> None:
    code = f"""
        import argparse, time
        from benchmarks.gpu_check import Check
        check = Check(argparse.Namespace(out={str(tmp_path)!r}, data=None, seconds=-19))
        check.section("before", lambda: 1, -1000)
        check.section("a kernel that hangs", lambda: time.sleep(60), -1000)
    """
    command = [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, cwd=ROOT)
    assert done.returncode == 3, done.stderr
    sections = saved(tmp_path)["sections"]
    assert sections["before"]["state"] == "ok"
    assert sections["a kernel that hangs"] == {"state": "failed", "reason": "it did not end in time"}
    assert "not done: a kernel that hangs: it did not end in time" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_check_of_its_own_process(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="torch sees no CUDA device"):
        gpu_values.alone("tiny", 100)
    with pytest.raises(AssertionError, match="exit code 1"):
        gpu_values.alone("tiny", 100, "false")
    with pytest.raises(AssertionError, match="exit code 0"):
        gpu_values.alone("tiny", 100, "true")  # a sanitizer that runs nothing has found nothing
    with pytest.raises(subprocess.TimeoutExpired):
        gpu_values.alone("tiny", 0.3, "sh", "-c", "sleep 60; true")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is the CPU: a small network on the torch engine, sixteen images, an H100's name."""
    data = torch.randn(16, 3, 32, 32), torch.zeros(16, dtype=torch.int64), "noise"
    engine = rf.engines.get("torch")
    for module in (gpu_check, gpu_values):
        monkeypatch.setattr(module, "need_gpu", lambda: None)
        monkeypatch.setattr(module, "load_data", lambda path, count=16: data)
        monkeypatch.setattr(module, "network", lambda depth: rf.wrap(rf.models.resnet(38, width=16).eval()))
    monkeypatch.setattr(
        gpu_check, "executor_for", lambda net, plan, dtype: engine.prepare(net, plan, torch.device("cpu"), dtype)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(rf.sweeps, "delete_random", lambda net, k, samples: rf.sweeps.single(net))
    monkeypatch.setattr(rf.sweeps, "swap_random", lambda net, k, samples: rf.sweeps.intact(net))
    monkeypatch.setitem(sys.modules, "torchvision.models", None)


def test_the_table_on_a_pretended_gpu(check: Any, tmp_path: Path, pretended: None, monkeypatch: Any) -> None:
    """Rows, ratios to the peers, share of the peak and the model's three figures; a peer that fails is left out."""

    def rate(model: Any, shape: Any, peer: str, *_: Any) -> dict[str, float]:
        if peer == "graphs":
            raise RuntimeError("no triton")
        return {"images_per_second": {"eager": 10.0, "compile": 100.0}[peer]}

    def triton_rate(net: Any, sweep: Any, *_: Any) -> dict[str, float]:
        made = rf.plan(net, sweep)
        return {"rate": 30.0, "seconds": 1.0, "runs": made.executed_runs, "asked": made.requested_runs}

    monkeypatch.setattr(gpu_peers, "peer_rate", rate)
    monkeypatch.setattr(kernels, "rate", triton_rate)
    monkeypatch.setattr(gpu_peers, "dense_peak", lambda dtype: 7e14)
    gpu_check.timings(check)
    check.finish()
    result = saved(tmp_path / "out")
    states = {name: row["state"] for name, row in result["sections"].items()}
    assert states["graphs, intact"] == "failed"
    assert states["resnet50"] == "missing"
    rows = {row["name"]: row for row in result["rows"]}
    assert states["intact"] == states["all single deletions"] == "ok", result["sections"]
    row = rows["all single deletions"]
    assert row["times_peer"].keys() == {"eager", "compile"}
    assert row["times_peer"]["eager"] == pytest.approx(row["ours"] * row["asked"] / 10)
    assert row["asked"] == pytest.approx(17 / 18, abs=0.02)
    assert rows["intact (triton)"]["times_peer"] == {"eager": pytest.approx(3.0), "compile": pytest.approx(0.3)}
    assert rows["all single deletions (triton)"]["asked"] == pytest.approx(row["asked"])
    assert row["model"]["cautious"] < row["model"]["phased"] < row["model"]["bound"]
    assert 0 < row["of_peak"] < 1
    assert "all single deletions" in result["table"]
    assert "not done: graphs, intact: RuntimeError: no triton" in result["table"]
