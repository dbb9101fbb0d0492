"""The CUDA tape kernel's values, proven on a CPU: the kernel's own source on the host SIMT harness against float64."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from resens_fast.engines.cuda_pack import MAX_CLASSES, pack

from .cuda_host import HEAD, RESTORE, RUN, SAVE, SHORTCUT, Host, build
from .cuda_nets import Reference, network

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the host harness needs g++")
pytestmark = needs_compiler

DTYPES = [torch.bfloat16, torch.float16]
# Images per CTA and channels of the first stage: the variants of the kernel.
VARIANTS = pytest.mark.parametrize(("images", "width"), [(1, 16), (2, 16), (1, 32)])
KINDS = {
    "post-pad": {},
    "post-pad-trailing": {"before": 0},
    "post-pad-odd": {"before": 3},
    "post-projection": {"shortcut": "projection"},
    "pre-pad": {"preactivation": True},
    "pre-pad-activated": {"preactivation": True, "activated": True},
    "pre-projection-raw": {"preactivation": True, "shortcut": "projection"},
    "pre-projection-activated": {"preactivation": True, "shortcut": "projection", "activated": True},
}
# Per block, from the kernel's own incoming state: what fp32 accumulation leaves, where it flips the rounding of a few
# inner activations. A wrong tap, channel, halo or bias gives 1e-2 and more.
RMS, LARGEST = 1.5e-4, 3e-3


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def host() -> Host:
    return Host(build())


def clean(result) -> None:
    assert not any(result.failures.values()), result.failures


def stem_like(n: int, seed: int = 0, nonnegative: bool = True, width: int = 16) -> torch.Tensor:
    x = torch.randn(n, width, 32, 32, generator=torch.Generator().manual_seed(seed))
    return x.relu() if nonnegative else x


def channels_last(x: torch.Tensor) -> np.ndarray:
    return x.permute(0, 2, 3, 1).contiguous().numpy()


def tape_of(words: list[tuple[tuple[int, float], ...]]) -> tuple[list[tuple[int, int]], list[float]]:
    """A tape of words of (block, gate); gate 0 is a SHORTCUT. Depth first, children in order of first appearance."""
    tape, gates, free = [], [], [0]

    def emit(op: int, arg: int, gate: float = 0.0) -> None:
        tape.append((op, arg))
        gates.append(gate)

    def visit(members: list[int], depth: int) -> None:
        for w in members:
            if len(words[w]) == depth:
                emit(HEAD, w)
        children: dict[tuple[int, float], list[int]] = {}
        for w in members:
            if len(words[w]) > depth:
                children.setdefault(words[w][depth], []).append(w)
        slot = free[0]
        if len(children) > 1:
            emit(SAVE, slot)
            free[0] += 1
        for i, (letter, below) in enumerate(children.items()):
            if i:
                emit(RESTORE, slot)
            emit(RUN if letter[1] else SHORTCUT, *letter)
            visit(below, depth + 1)
        if len(children) > 1:
            free[0] -= 1

    visit(list(range(len(words))), 0)
    return tape, gates


def reference_logits(net, dtype, states: torch.Tensor, words) -> np.ndarray:
    reference = Reference(net, dtype)
    return np.stack(
        [reference.word(states, [(b, float(np.float32(g)), g == 0) for b, g in word]).numpy() for word in words]
    )


def reference_tally(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    z = torch.from_numpy(logits).double()
    loss = torch.stack(
        [torch.nn.functional.cross_entropy(w, torch.from_numpy(labels).long(), reduction="none") for w in z]
    )
    return np.stack([(logits.argmax(-1) != labels).sum(1), np.round(loss.numpy() * 2**24).sum(1), np.zeros(len(z))], 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@VARIANTS
@pytest.mark.parametrize("kind", KINDS)
def test_every_block_kind_at_every_stage(host: Host, kind: str, images: int, width: int, dtype: torch.dtype) -> None:
    net = network(seed=1, width=width, **KINDS[kind])
    letters = [
        (RUN, 0, 1.0),
        (RUN, 1, 0.3),
        (RUN, 2, 0.5),
        (SHORTCUT, 3, 0.0),
        (RUN, 3, -1.5),
        (RUN, 4, 1.0),
        (RUN, 5, 1e-4),
    ]
    packed = pack(net, dtype)
    program = host.program(
        packed, [(o, b) for o, b, _ in letters] + [(HEAD, 0)], [g for _, _, g in letters] + [0.0], images
    )
    x = stem_like(images, 3, not KINDS[kind].get("preactivation"), width)
    states, result = host.trace(packed, program, channels_last(x), images)
    clean(result)
    assert np.array_equal(states[0], x.numpy())
    reference, before, at = Reference(net, dtype), states[0], 1
    for op, index, gate in letters:
        block = net.blocks[index]
        if op == SHORTCUT and not block.closing_relu and block.shortcut.kind == "identity":
            continue  # nothing runs
        want = reference.run(block, torch.from_numpy(before), float(np.float32(gate)), op == SHORTCUT)
        error = torch.from_numpy(states[at]).double() - want
        assert error.square().mean().sqrt() < RMS * want.square().mean().sqrt(), (kind, index)
        assert error.abs().max() < LARGEST * want.abs().max(), (kind, index)
        before = states[at]
        at += 1


@pytest.mark.parametrize("kind", ["post-projection", "pre-projection-raw", "pre-pad-activated"])
@VARIANTS
def test_deleted_transitions(host: Host, kind: str, images: int, width: int) -> None:
    net = network(seed=2, width=width, **KINDS[kind])
    packed = pack(net, torch.bfloat16)
    tape = [(RUN, 0), (SHORTCUT, 2), (SHORTCUT, 4), (RUN, 5), (HEAD, 0)]
    program = host.program(packed, tape, [0.7, 0, 0, 1, 0], images)
    x = stem_like(images, 5, width=width)
    states, result = host.trace(packed, program, channels_last(x), images)
    clean(result)
    reference = Reference(net, torch.bfloat16)
    for at, (op, index) in enumerate(tape[:-1], 1):
        want = reference.run(
            net.blocks[index],
            torch.from_numpy(states[at - 1]),
            float(np.float32(0.7)) if index == 0 else 1.0,
            op == SHORTCUT,
        )
        error = torch.from_numpy(states[at]).double() - want
        assert error.square().mean().sqrt() < RMS * want.square().mean().sqrt(), (kind, index)


def test_a_tiny_gate_leaves_the_stream_alone(host: Host) -> None:
    net = network(seed=4)
    packed = pack(net, torch.bfloat16)
    x = stem_like(2, 7)
    program = host.program(packed, [(RUN, 0), (RUN, 2), (RUN, 4), (HEAD, 0)], [1e-30, 1, 1, 0], 2)
    states, result = host.trace(packed, program, channels_last(x), 2)
    clean(result)
    assert np.abs(states[1] - x.numpy()).max() < 1e-28  # dividing the stream by the gate would have lost it


WORDS = [
    ((0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 1.0)),
    ((0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0)),
    ((0, 1.0), (1, 1.0), (2, 0.0), (3, 0.5), (4, 1.0), (5, 1.0)),
    ((1, 1.0), (0, 1.0), (2, 1.0), (4, 0.0)),
    ((2, 1.0), (3, 1.0), (3, 1.0), (4, 1.0), (5, -0.25)),
    ((0, 1.0), (1, 0.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 1.0)),
    ((2, 1.0), (4, 1.0)),
    ((0, 1.0), (2, 1.0), (3, 0.125), (4, 1.0), (5, 0.0)),
]


@pytest.mark.parametrize(
    ("kind", "dtype", "width"),
    [
        ("post-pad", torch.float16, 16),
        ("post-projection", torch.bfloat16, 16),
        ("pre-projection-raw", torch.float16, 16),
        ("pre-projection-activated", torch.bfloat16, 16),
        ("pre-projection-activated", torch.bfloat16, 32),
        ("post-pad", torch.float16, 32),
    ],
)
def test_mixed_tape_with_every_instruction(host: Host, kind: str, dtype: torch.dtype, width: int) -> None:
    net = network(seed=6, width=width, **KINDS[kind])
    packed = pack(net, dtype)
    x = stem_like(4, 8, width=width)
    labels = np.array([1, 5, 3, 9])
    tape, gates = tape_of(WORDS)
    assert {op for op, _ in tape} == {SAVE, RESTORE, RUN, SHORTCUT, HEAD}
    want = reference_logits(net, dtype, x, WORDS)
    bits = None
    for images, parts, ctas, stride in ((2, 1, 1, 1), (2, 3, 2, 7), (1, 8, 3, 5)):
        per_cta = images if width == 16 else 1
        program = host.program(packed, tape, gates, per_cta, parts)
        result = host.run(packed, program, channels_last(x), labels, len(WORDS), per_cta, ctas, stride)
        clean(result)
        error = np.sqrt(np.square(result.logits - want).mean()) / np.sqrt(np.square(want).mean())
        assert error < 1e-3, (images, parts)
        exact = reference_tally(result.logits, labels)
        assert np.array_equal(result.tally[:, [0, 2]], exact[:, [0, 2]])
        assert np.abs(result.tally[:, 1] - exact[:, 1]).max() < 2**24 * 4e-6
        # the same bits in either variant, for any cut of the tape, number of CTAs and order of threads
        bits = bits if bits is not None else (result.logits.copy(), result.tally.copy())
        assert np.array_equal(bits[0], result.logits)
        assert np.array_equal(bits[1], result.tally)


def test_a_word_alone_gives_the_same_bits(host: Host) -> None:
    net = network(seed=6)
    packed = pack(net, torch.bfloat16)
    x = channels_last(stem_like(2, 8))
    together = host.run(packed, host.program(packed, *tape_of(WORDS), 2), x, [0, 1], len(WORDS), 2)
    for w in (0, 2, 4, 7):
        alone = host.run(packed, host.program(packed, *tape_of([WORDS[w]]), 2), x, [0, 1], 1, 2)
        clean(alone)
        assert np.array_equal(alone.logits[0], together.logits[w])
        assert np.array_equal(alone.tally[0], together.tally[w])


@pytest.mark.parametrize(("preactivation", "count"), [(False, 6), (True, 2)], ids=["post", "pre"])
def test_a_network_of_54_blocks(host: Host, preactivation: bool, count: int) -> None:
    net = network(seed=9, blocks_per_stage=18, preactivation=preactivation, scale=0.3)
    packed = pack(net, torch.bfloat16)
    reference = Reference(net, torch.bfloat16)
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    states, failures = host.stem(packed, images, 2)
    assert not any(failures.values())
    deleted = {3, 7, 20, 21, 36, 40, 50}
    words = [
        tuple((b, 1.0) for b in range(54)),
        tuple((b, 0.0 if b == 36 else 1.0) for b in range(54) if b == 36 or b not in deleted),
    ]
    x = reference.stem(images)
    rounded, exact = (reference_logits(net, dtype, x, words) for dtype in (torch.bfloat16, None))
    labels = rounded[0].argmax(-1)
    program = host.program(packed, *tape_of(words), 2)
    result = host.run(packed, program, states, labels, 2, 2, ctas=2)
    clean(result)
    size = np.sqrt(np.square(exact).mean())
    # Rounding flips grow through 54 blocks: no model follows each one, but the error stays that of operand rounding.
    rms = np.sqrt(np.square(rounded - exact).mean())
    assert np.sqrt(np.square(result.logits - exact).mean()) < 2 * rms
    assert rms < 0.05 * size
    ordered = np.sort(exact, -1)
    sure = ordered[..., -1] - ordered[..., -2] > 2 * np.abs(result.logits - exact).max()
    assert np.array_equal(result.logits.argmax(-1)[sure], exact.argmax(-1)[sure])
    assert sure.sum() >= count
    assert np.array_equal(result.tally[:, 0], (result.logits.argmax(-1) != labels).sum(1))


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize(("preactivation", "width"), [(False, 16), (True, 16), (False, 32)])
def test_stem(host: Host, in_channels: int, preactivation: bool, width: int) -> None:
    net = network(in_channels=in_channels, preactivation=preactivation, width=width)
    images = torch.randn(3, in_channels, 32, 32, generator=torch.Generator().manual_seed(2))
    states, failures = host.stem(pack(net, torch.bfloat16), images, 2)
    assert not any(failures.values())
    want = channels_last(Reference(net, None).stem(images))
    assert np.abs(states[:3] - want).max() < 2e-6 * np.abs(want).max()
    assert not states[3].any()  # the padding of the last tile


@pytest.mark.parametrize("classes", [1, 2, 33, 100, MAX_CLASSES])
@VARIANTS
def test_head_with_any_number_of_classes(host: Host, classes: int, images: int, width: int) -> None:
    net = network(seed=3, blocks_per_stage=1, classes=classes, width=width)
    packed = pack(net, torch.bfloat16)
    words = [((1, 0.0), (2, 0.0))]
    x = stem_like(4, 11, width=width)
    labels = np.array([0, classes - 1, classes // 2, 0])
    program = host.program(packed, *tape_of(words), images)
    result = host.run(packed, program, channels_last(x), labels[:3], 1, images, count=3)  # the last tile is padded
    clean(result)
    want = reference_logits(net, torch.bfloat16, x, words)[:, :3]
    assert np.abs(result.logits - want).max() < 1e-5 * np.abs(want).max()
    exact = reference_tally(result.logits, labels[:3])
    assert np.array_equal(result.tally[:, [0, 2]], exact[:, [0, 2]])
    assert np.abs(result.tally[:, 1] - exact[:, 1]).max() < 2**24 * 2e-5


def head_only(host: Host, change, images: int = 2, labels=(0, 1)) -> np.ndarray:
    """Tally of a network whose head's weight and bias `change` has edited."""
    net = network(seed=3, blocks_per_stage=1, classes=40)
    change(net.head)
    packed = pack(net, torch.bfloat16)
    program = host.program(packed, *tape_of([((1, 0.0), (2, 0.0))]), images)
    result = host.run(packed, program, channels_last(stem_like(2, 11)), labels, 1, images)
    clean(result)
    return result.tally[0]


@pytest.mark.parametrize("images", [1, 2])
def test_ties_take_the_lowest_index(host: Host, images: int) -> None:
    def equal(head) -> None:
        head.weight.zero_()
        head.bias.fill_(-1.0)
        head.bias[[5, 7, 37]] = 2.0

    errors, loss, nonfinite = head_only(host, equal, images, (5, 7)).tolist()
    assert (errors, nonfinite) == (1, 0)
    assert abs(loss / 2**24 - 2 * math.log(3 + 37 * math.exp(-3))) < 1e-5


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_nonfinite_logits_are_errors_without_a_loss(host: Host, value: float) -> None:
    def spoil(head) -> None:
        head.bias[33] = value

    assert head_only(host, spoil).tolist() == [2, 0, 2]


def test_a_loss_is_limited(host: Host) -> None:
    def steep(head) -> None:
        head.weight.zero_()
        head.bias.zero_()
        head.bias[3] = 1e30

    assert head_only(host, steep).tolist() == [2, 2 * 2**40, 0]


def test_nan_in_an_image_reaches_the_count(host: Host) -> None:
    net = network(seed=3, blocks_per_stage=1)
    packed = pack(net, torch.bfloat16)
    x = stem_like(2, 11)
    x[1, 4, 10, 10] = math.nan
    program = host.program(packed, *tape_of([((0, 1.0), (1, 1.0), (2, 1.0))]), 2)
    result = host.run(packed, program, channels_last(x), np.array([0, 0]), 1, 2)
    assert result.tally[0, 2] == 1
    assert np.isnan(result.logits[0, 1]).all()
    assert np.isfinite(result.logits[0, 0]).all()
