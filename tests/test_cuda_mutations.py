"""The host harness catches planted bugs: the kernel is built with each of them and must fail."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from resens_fast.engines.cuda_pack import pack
from resens_fast.fused import Shortcut

from .cuda_host import CSRC, Host, build, mutated
from .cuda_nets import network
from .test_cuda_host import WORDS, channels_last, reference_logits, stem_like, tape_of

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the host harness needs g++")

_RING_WAIT = "cp_async_wait<kRingSlots - 2>();"
_PAST_BLOCK = "barrier();  // other warps may still read Y in the block before"
_ZEROED = "// X and Y have been read in the old layout\n  zero_halo<G>(X, thread_id());"
_LOGIT = "sts_float(head + im * kSums + (G::kChannels + k) * 4, z);"
MUTATIONS = {  # name: (file in csrc/cuda, what stands there, what is planted)
    "dropped barrier in the weight ring": ("conv.cuh", "barrier();\n    int s = slot;", "int s = slot;"),
    "dropped wait": ("conv.cuh", _RING_WAIT, ""),
    "wait one group short": ("conv.cuh", _RING_WAIT, "cp_async_wait<kRingSlots - 1>();"),
    "wrong ring slot": ("conv.cuh", "issue(s == 0 ? kRingSlots - 1 : s - 1);", "issue(s);"),
    "halo not zeroed": ("geometry.cuh", "y = 1 + (j >> 1);", "continue;"),
    "halo not zeroed at a transition": ("block.cuh", _ZEROED, ""),
    "dropped barrier before a transition": ("block.cuh", _PAST_BLOCK, ""),
    "dropped barrier within a transition": ("block.cuh", "barrier();  // X and Y have been read in the old layout", ""),
    "dropped barrier in the head": ("head.cuh", "barrier();  // the next HEAD writes the sums", ""),
    "bias without the gate": ("block.cuh", "v.x *= gate;", ""),
    "tap of the wrong column": ("conv.cuh", "first * G::kPitch + dx * 16 +", "first * G::kPitch + (2 - dx) * 16 +"),
    "row written before it is complete": ("conv.cuh", "write(acc[(t - 2) % 3]", "write(acc[(t - 1) % 3]"),
    "gate forgotten": ("block.cuh", "bool plain = gate == 1.f;", "bool plain = true;"),
    "misaligned ring": ("interpreter.cuh", "ring = Y + kBuffer,", "ring = Y + kBuffer + 8,"),
    "prefetch past the list": ("program.cpp", "i < kRingSlots; i++) out.chunks", "i < 0; i++) out.chunks"),
    "logits behind the end of shared memory": ("head.cuh", _LOGIT, _LOGIT.replace("head", "head + 65536")),
}
EVERY_TIME = {
    "dropped barrier in the weight ring",
    "dropped wait",
    "wrong ring slot",
    "halo not zeroed at a transition",
    "dropped barrier before a transition",
    "logits behind the end of shared memory",
}
_CASES = [name if name in EVERY_TIME else pytest.param(name, marks=pytest.mark.slow) for name in MUTATIONS]


def caught(host: Host) -> str | None:
    """What is wrong with this build on the mixed tape, or None."""
    net = network(seed=6, shortcut="projection")
    padded = dataclasses.replace(net.blocks[2], shortcut=Shortcut("pad", 2, 8, 8, 0, None, False))
    net = dataclasses.replace(net, blocks=(*net.blocks[:2], padded, *net.blocks[3:]))
    packed = pack(net, torch.bfloat16)
    x = stem_like(2, 8)
    words = [*WORDS[:5], WORDS[0]]
    tape, gates = tape_of(words)
    program = host.program(packed, tape, gates, 2)
    result = host.run(packed, program, channels_last(x), [1, 5], len(words), 2)
    for name, count in result.failures.items():
        if count:
            return name
    want = reference_logits(net, torch.bfloat16, x, words)
    error = np.sqrt(np.square(result.logits - want).mean() / np.square(want).mean())
    return None if error < 1e-3 else f"values off by {error:.1e}"


def test_the_kernel_as_it_is_passes() -> None:
    assert caught(Host(build(CSRC, "-O1", "-march=native", "-DRF_ONLY_TWO_IMAGES_BF16"))) is None


@pytest.mark.parametrize("name", _CASES)
def test_mutation_is_caught(name: str) -> None:
    assert caught(Host(mutated(name, *MUTATIONS[name]))) is not None
