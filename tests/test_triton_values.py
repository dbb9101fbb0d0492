"""The Triton kernels compute the right numbers: Triton's interpreter on the CPU against float64 (triton_cases.py)."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import triton_cases

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is missing")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[str, triton_cases.Result]:
    """Every case that was collected, in one process with the interpreter on."""
    names = [
        item.callspec.params["case"]
        for item in request.session.items
        if item.fspath == request.node.fspath and hasattr(item, "callspec")
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton_cases", *names], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_gradients_are_refused_by_name() -> None:
    from resens_fast.engines.triton_gradients import refusal

    whole, _ = triton_cases.network("post-pooled-pad-3-10")
    assert refusal(whole, "first_block") is None
    assert "not at image" in str(refusal(whole, "image"))
    open_end = dataclasses.replace(whole.blocks[-1], closing_relu=False)
    mixed = dataclasses.replace(whole, blocks=(*whole.blocks[:-1], open_end))
    assert "blocks 0 (0.0) and 3 (1.1)" in str(refusal(mixed, "first_block"))


@pytest.mark.parametrize("case", triton_cases.cases())
def test_interpreted(results: dict[str, triton_cases.Result], case: str) -> None:
    result = results[case]
    assert "failure" not in result, result["failure"]
    assert result["error"] <= result["bound"], result
