"""The cut of a plan's tape into parts, read back from what the kernel would run."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resens_fast.engines.cuda_pack import pack

from .cuda_host import HEAD, RESTORE, RUN, Host, build
from .cuda_nets import network
from .test_cuda_host import tape_of

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the host harness needs g++")


@pytest.fixture(scope="module")
def host() -> Host:
    return Host(build())


def letters_of(program, blocks: np.ndarray) -> tuple[dict[int, tuple], int]:
    """The letters that reach each HEAD when the device tape is read, and the number of slots alive at once."""
    by_parameters = {int(row[4]): i for i, row in enumerate(blocks)}
    out, most = {}, 0
    for start in program.parts[:, 0]:
        state, slots = None, {}
        for code, argument, parameters, gate in program.tape[start:]:
            op, skipped = code & 255, code >> 16 & 16
            if op == 0:
                state = ()
            elif op == 1:
                slots[argument] = state
                most = max(most, argument + 1)
            elif op == 2:
                state = slots[argument]
            elif op in (3, 4):
                state = (
                    *state,
                    (by_parameters[int(parameters)], 0.0 if skipped else float(np.int32(gate).view(np.float32))),
                )
            elif op == 6:
                assert argument not in out
                out[int(argument)] = state
            elif op == 7:
                break
    return out, most


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_cut_keeps_every_word(host: Host, data: st.DataObject) -> None:
    """Every word once, with its letters, in whatever number of parts; slots stay within log2 of the words."""
    net = network(seed=0, blocks_per_stage=3, preactivation=True)  # identity blocks drop: no letter for a deletion
    packed = pack(net, torch.bfloat16)
    within = [st.lists(st.sampled_from((3 * s + 1, 3 * s + 2)), max_size=3) for s in range(3)]
    words = data.draw(st.lists(st.tuples(*within), min_size=1, max_size=24, unique_by=str))
    spelled = [tuple((b, 1.0) for b in (*a, 3, *m, 6, *z)) for a, m, z in words]
    parts = data.draw(st.integers(1, 9))
    images = data.draw(st.sampled_from((1, 2)))
    program = host.program(packed, *tape_of(spelled), images, parts)
    letters, slots = letters_of(program, packed.blocks.numpy())
    assert [letters[w] for w in range(len(spelled))] == spelled
    assert slots <= math.log2(len(spelled)) + 1e-9
    assert slots == program.slots
    assert 1 <= len(program.parts) <= max(1, min(parts, len(spelled)))


@pytest.mark.parametrize(
    ("tape", "message"),
    [
        ([(RESTORE, 2)], "restores slot 2"),
        ([(RUN, 9)], "names block 9"),
        ([(RUN, 3)], "another shape"),
        ([(RUN, 0), (HEAD, 0)], "last stage"),
        ([(9, 0)], "unknown operation 9"),
    ],
)
def test_a_tape_that_does_not_fit_is_refused(host: Host, tape, message: str) -> None:
    packed = pack(network(), torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        host.program(packed, tape, [1.0] * len(tape), 2)
