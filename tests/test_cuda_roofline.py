"""The counter model counts what the kernel executes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from benchmarks import roofline
from resens_fast.engines.cuda_pack import pack

from .cuda_host import HEAD, RUN, Host, build
from .cuda_nets import network
from .test_cuda_host import VARIANTS, channels_last, stem_like

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the host harness needs g++")
UNITS = ("mma", "ldmatrix", "lds128", "sts32", "cp_async", "barriers")


@pytest.fixture(scope="module")
def host() -> Host:
    return Host(build())


def executed(host: Host, packed, blocks: list[int], images: int) -> np.ndarray:
    tape = [*((RUN, b) for b in blocks), (HEAD, 0)]
    program = host.program(packed, tape, [1.0] * len(tape), images)
    x = channels_last(stem_like(images, width=packed.width))
    result = host.run(packed, program, x, np.zeros(images), 1, images)
    return np.array([result.counts[unit] for unit in UNITS])


@VARIANTS
@pytest.mark.parametrize("shortcut", ["pad", "projection"])
def test_counts_are_those_of_the_harness(host: Host, images: int, width: int, shortcut: str) -> None:
    packed = pack(network(shortcut=shortcut, width=width), torch.bfloat16)
    base = executed(host, packed, [2, 4], images)  # the two transitions and the head

    def modelled(counts: roofline.Counts) -> list[int]:
        return [getattr(counts, unit) for unit in UNITS]

    for stage, block in enumerate((1, 3, 5)):
        order = sorted([2, 4, block])
        got = executed(host, packed, order, images) - base
        assert got.tolist() == modelled(roofline.identity(images, stage, width)), stage
    both = [roofline.transition(images, s, shortcut == "projection", width) for s in (1, 2)]
    want = np.array(modelled(both[0] + both[1]))
    assert base[:3].tolist() == want[:3].tolist()
    assert 0 <= base[5] - want[5] <= 12  # the head's barriers and those of the item


def test_the_figures_of_the_issue() -> None:
    h100 = roofline.CARDS["h100"]
    rates = [roofline.images_per_second(h100, 18, figure) for figure in ("bound", "phased", "cautious")]
    assert rates == sorted(rates, reverse=True)
    assert 0.9e6 < rates[0] < 1.3e6
    assert roofline.table(h100, 18).count("\n") == 9
