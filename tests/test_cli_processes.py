"""The command line as a real process: stopped, killed and resumed."""

# ruff: noqa: F401, F811
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

import resens_fast as rf
from tests.test_cli import call, nets, small  # nets is a fixture

# Parts of 40 images and a third of a second per batch of 20: time to stop a run between two parts.
SLOW = """
import time
from importlib import import_module

executor = import_module("resens_fast.engines.torch").TorchExecutor
begin, tally = executor.__init__, executor.tally

def __init__(self, *arguments, **named):
    begin(self, *arguments, **named)
    self.batch = 20

def slow(self, images, labels, progress=None):
    time.sleep(0.3)
    return tally(self, images, labels, progress)

executor.__init__, executor.tally = __init__, slow
import_module("resens_fast.evaluate")._PART_IMAGES = 40
from resens_fast.cli import main
main()
"""


def process(nets: Path, out: Path, slow: bool) -> subprocess.Popen[str]:
    program = SLOW if slow else "from resens_fast.cli import main; main()"
    arguments = [
        "lesion",
        f"{nets}:small",
        "--data",
        "digits",
        "--limit-images",
        "400",
        "--threads",
        "1",
        "--engine",
        "torch",  # the small steps that SLOW slows down
        "--out",
        str(out),
    ]
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Under nohup, and in many a CI, children inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for_parts(out: Path, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not list(out.glob("parts/*.parquet")):
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline, "no part was written in two minutes"
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_process_is_resumed_by_the_same_command(nets: Path, tmp_path: Path, how: signal.Signals) -> None:
    out = tmp_path / "study"
    job = process(nets, out, slow=True)
    wait_for_parts(out, job)
    job.send_signal(how)
    _, err = job.communicate(timeout=60)
    if how == signal.SIGINT:
        assert job.returncode == 130
        assert "Traceback" not in err
        assert f"resens: interrupted; finished parts are kept in {out}: run the same command again to go on" in err
    kept = {p: p.read_bytes() for p in out.glob("parts/*.parquet")}
    assert not rf.open_study(out).complete
    unfinished = call("show", out)
    assert unfinished.exit_code == 0
    assert "resens: the study is not finished" in unfinished.stderr
    if how == signal.SIGINT:  # after a kill there is no note of what was run
        assert "factories_for_cli.py:small on digits (test): " in unfinished.stdout
    again = small(nets, out, "--engine", "torch", limit=400)
    assert again.exit_code == 0, again.output
    assert {p: p.read_bytes() for p in kept} == kept, "a finished part was computed again"
    assert small(nets, tmp_path / "whole", limit=400).exit_code == 0
    resumed, whole = rf.open_study(out), rf.open_study(tmp_path / "whole")
    assert resumed.complete
    pd.testing.assert_frame_equal(resumed.frame, whole.frame, rtol=1e-6)


def test_a_real_process_ends_with_two_and_one_line(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "from resens_fast.cli import main; main()"]
    job = subprocess.run([*program, "show", str(tmp_path)], capture_output=True, text=True, check=False)
    assert job.returncode == 2
    assert job.stderr == f"resens: {tmp_path} holds no study: there is no manifest.json in it\n"
    assert job.stdout == ""
