"""Sweeps: the draws, the columns and the errors."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kendalltau

from resens_fast import sweeps
from resens_fast.errors import SweepError
from resens_fast.structure import Structure
from resens_fast.sweep import Sweep


def stages(*lengths: int, drops: bool = True) -> Structure:
    """A CIFAR-like network: every stage but the first begins with a transition, which has a shortcut of its own."""
    n = sum(lengths)
    firsts = set(np.cumsum(lengths)[:-1].tolist())
    stage = [s for s, length in enumerate(lengths, 1) for _ in range(length)]
    out = [(16 * 2 ** (s - 1), 32 // 2 ** (s - 1), 32 // 2 ** (s - 1)) for s in stage]
    transitions = tuple(i in firsts for i in range(n))
    return Structure(
        names=tuple(f"blocks.{i}" for i in range(n)),
        stages=tuple(stage),
        kinds=("basic",) * n,
        transitions=transitions,
        deletable=(True,) * n,
        drops=tuple(drops and not t for t in transitions),
        gateable=(True,) * n,
        shapes_in=tuple(out[i - 1] if transitions[i] else out[i] for i in range(n)),
        shapes_out=tuple(out),
        input_shape=(3, 32, 32),
        classes=10,
    )


def plain() -> Structure:
    """Three sequential layers; the second changes the width and cannot be deleted."""
    shapes = ((8, 8, 8), (8, 8, 8), (16, 8, 8), (16, 4, 4))
    return Structure(
        names=("a", "b", "c"),
        stages=(1, 2, 3),
        kinds=("plain",) * 3,
        transitions=(False, True, True),
        deletable=(True, False, True),
        drops=(True, False, False),
        gateable=(False,) * 3,
        shapes_in=shapes[:3],
        shapes_out=shapes[1:],
        input_shape=(3, 8, 8),
        classes=4,
    )


RESNET110 = stages(18, 18, 18)


def test_counts() -> None:
    assert len(sweeps.intact(RESNET110)) == 1
    assert len(sweeps.single(RESNET110)) == 54
    assert len(sweeps.pairs(RESNET110)) == 1431
    assert len(sweeps.delete_random(RESNET110, k=range(1, 21), samples=3)) == 60
    assert len(sweeps.swap_random(RESNET110, k=[1, 5], samples=7)) == 14
    assert [c.gates.count(0.0) for c in sweeps.single(RESNET110)] == [1] * 54


def test_draws_are_frozen() -> None:
    """The same seed gives the same draws on every version and machine: these lines may never change."""
    net = stages(3, 3)
    deleted = sweeps.delete_random(net, k=[2, 3], samples=3, seed=7).frame["deleted"].tolist()
    assert deleted == [(2, 3), (1, 2), (1, 3), (0, 2, 4), (2, 3, 4), (1, 4, 5)]
    orders = sweeps.swap_random(net, k=[1, 3], samples=2, seed=7).frame["order"].tolist()
    assert orders == [(0, 2, 1, 3, 4, 5), (0, 1, 2, 3, 5, 4), (0, 1, 2, 3, 5, 4), (0, 2, 1, 3, 4, 5)]


def test_a_stream_per_k() -> None:
    alone = sweeps.delete_random(RESNET110, k=5, samples=4, seed=3)
    among = sweeps.delete_random(RESNET110, k=[2, 5, 9], samples=8, seed=3)
    assert [c.gates for c in alone] == [among[8 + i].gates for i in range(4)]
    assert sweeps.delete_random(RESNET110, k=5, samples=4, seed=4).digest != alone.digest


def test_subsets_are_uniform() -> None:
    net = stages(5)
    frame = sweeps.delete_random(net, k=2, samples=20_000, seed=1).frame
    counts = frame["deleted"].value_counts()
    assert len(counts) == 10
    assert chisquare(counts).pvalue > 1e-4


def test_swaps_are_uniform_and_stay_within_shapes() -> None:
    net = stages(3, 4)
    counts = sweeps.swap_random(net, k=1, samples=12_000, seed=1).frame["order"].value_counts()
    assert len(counts) == 3 + 3  # pairs among blocks 0-2 and among 4-6; block 3 is the transition
    assert chisquare(counts).pvalue > 1e-4
    for order in sweeps.swap_random(net, k=20, samples=50).orders:
        assert sorted(order[:3]) == [0, 1, 2]
        assert order[3] == 3
        assert sorted(order[4:]) == [4, 5, 6]


def test_tau_is_scipys() -> None:
    sweep = sweeps.swap_random(RESNET110, k=[0, 1, 5, 50], samples=5, seed=2) + sweeps.single(RESNET110)
    expected = [kendalltau(order, range(54)).statistic for order in sweep.orders]
    np.testing.assert_allclose(sweep.tau, expected, rtol=0, atol=1e-12)


def test_frame_columns() -> None:
    net = stages(2, 2)
    sweep = sweeps.intact(net) + sweeps.single(net) + sweeps.from_orders(net, [[1, 0, 2, 3]])
    frame = sweep.frame
    assert list(frame.columns) == ["configuration", "kind", "k", "deleted", "order", "tau", "transition"]
    assert frame["kind"].tolist() == ["intact"] + ["delete"] * 4 + ["order"]
    assert frame["k"].tolist() == [0, 1, 1, 1, 1, 0]
    assert frame["deleted"].tolist() == [(), (0,), (1,), (2,), (3,), ()]
    assert frame["transition"].tolist() == [False, False, False, True, False, False]
    assert all(type(v) is int for v in frame["order"].iloc[5])
    assert "gates" in sweeps.from_gates(net, [[1, 0.5, 1, 1]]).frame


def test_transitions_can_be_left_out() -> None:
    frame = sweeps.delete_random(RESNET110, k=30, samples=50, transitions=False).frame
    assert not frame["transition"].any()
    assert sweeps.delete_random(RESNET110, k=30, samples=50).frame["transition"].any()


def test_words() -> None:
    net = stages(2, 2)
    sweep = sweeps.from_words(net, [[1, 0, 2, 3], [0, 1, 2, 3]], [[0.5, 0, 1, 1], [1, 1, 0, -0.0]])
    words = sweep.words()
    assert words.offsets.tolist() == [0, 3, 6]
    assert words.blocks.tolist() == [0, 2, 3, 0, 1, 2]  # a deleted block has no letter, unless it is a transition
    assert words.gates.tolist() == [0.5, 1, 1, 1, 1, 0]
    assert words.positions.tolist() == [1, 2, 3, 0, 1, 2]
    assert not np.signbit(sweep.gates).any()
    assert words.offsets.dtype == np.int64
    assert words.blocks.dtype == np.int32
    assert words.gates.dtype == np.float32


def test_masks_orders_gates_agree() -> None:
    masks = sweeps.from_masks(RESNET110, ~np.eye(54, dtype=bool))
    single = sweeps.single(RESNET110)
    assert (masks.gates == single.gates).all()
    assert (masks.orders == single.orders).all()
    assert (sweeps.from_gates(RESNET110, 1.0 - np.eye(54)).gates == single.gates).all()
    assert sweeps.from_masks(RESNET110, np.ones(54, dtype=int))[0] == sweeps.intact(RESNET110)[0]


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda n: sweeps.delete_random(n, k=7), "k = 7 blocks: the network has 6"),
        (lambda n: sweeps.delete_random(n, k=6, transitions=False), "has 5 deletable blocks outside transitions"),
        (lambda n: sweeps.delete_random(n, k=-1), "not -1"),
        (lambda n: sweeps.delete_random(n, k=1.5), "not 1.5"),
        (lambda n: sweeps.delete_random(n, k=[]), "k is empty"),
        (lambda n: sweeps.delete_random(n, k=1, samples=0), "samples must be .* not 0"),
        (lambda n: sweeps.delete_random(n, k=1, seed=-1), "seed must be .* not -1"),
        (lambda n: sweeps.from_masks(n, [[1, 1, 1]]), r"\[configurations, 6\].*not \[1, 3\]"),
        (lambda n: sweeps.from_masks(n, [[1, 1, 0.5, 1, 1, 1]]), "value 0.5"),
        (lambda n: sweeps.from_masks(n, np.ones((0, 6), bool)), "no configurations"),
        (lambda n: sweeps.from_orders(n, [[0, 1, 2, 3, 4, 4]]), "4 is repeated"),
        (lambda n: sweeps.from_orders(n, [[0, 1, 2, 3, 4, 6]]), "6 is repeated or out of range"),
        (lambda n: sweeps.from_orders(n, [[0, 1, 3, 2, 4, 5]]), r"puts block 3 \(blocks.3\) at position 2"),
        (lambda n: sweeps.from_orders(n, [[0, 1, 2, 4, 3, 5]]), "puts block 4"),
        (lambda n: sweeps.from_orders(n, [[0.0, 1, 2, 3, 4, 5]]), "whole numbers"),
        (lambda n: sweeps.from_gates(n, [[1, np.nan, 1, 1, 1, 1]]), r"block 1 \(blocks.1\) the gate nan"),
        (lambda n: sweeps.from_gates(n, [[1, 1e300, 1, 1, 1, 1]]), "gate inf"),
        (lambda n: sweeps.from_gates(n, [["a"] * 6]), "must hold numbers"),
        (lambda n: sweeps.from_gates(n, [[1] * 6, [1]]), "rectangular"),
        (lambda n: sweeps.from_words(n, [range(6)] * 2, [[1] * 6]), "2 rows and gates has 1"),
        (lambda n: sweeps.single(n) + sweeps.single(stages(2, 2)), "another network"),
        (lambda n: sweeps.single("net"), "not str"),
        (lambda n: sweeps.swap_random(stages(1, 1), k=1), "none can be swapped"),
        (lambda n: sweeps.pairs(stages(1)), "at least two"),
    ],
)
def test_errors_name_the_value(build, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SweepError, match=says):
        build(stages(3, 3))


def test_plain_networks() -> None:
    net = plain()
    assert sweeps.single(net).frame["deleted"].tolist() == [(0,), (2,)]
    with pytest.raises(SweepError, match=r"deletes block 1 \(b\), which cannot be deleted"):
        sweeps.from_masks(net, [[1, 0, 1]])
    with pytest.raises(SweepError, match="gate 0.5, but a plain block"):
        sweeps.from_gates(net, [[0.5, 1, 1]])


def test_slices_are_sweeps():
    net = stages(3, 3)
    sweep = sweeps.single(net) + sweeps.swap_random(net, k=[1, 2], samples=3, seed=0)
    part = sweep[2:9:3]
    assert isinstance(part, Sweep)
    assert list(part) == [sweep[2], sweep[5], sweep[8]][: len(part)]
    assert list(part.frame["k"]) == [sweep.frame["k"][at] for at in range(2, min(9, len(sweep)), 3)]
    with pytest.raises(SweepError, match="no configurations"):
        sweep[:0]
    assert list(sweep[-2:]) == [sweep[len(sweep) - 2], sweep[-1]]
    with pytest.raises(IndexError, match="configuration 99"):
        sweep[99]


def test_numbers_may_come_as_arrays_and_tensors():
    net = stages(3, 3)
    expected = sweeps.delete_random(net, k=[1, 2], samples=2, seed=0)
    for k in (np.array([1, 2]), torch.tensor([1, 2]), range(1, 3)):
        assert list(sweeps.delete_random(net, k=k, samples=2, seed=0)) == list(expected)
    one = sweeps.delete_random(net, k=torch.tensor(2), samples=2, seed=0)
    assert list(one) == list(sweeps.delete_random(net, k=2, samples=2, seed=0))
