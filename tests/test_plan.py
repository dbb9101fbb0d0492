"""Both schedules of both planners are replayed symbolically and must give exactly the words of the sweep."""

from __future__ import annotations

from itertools import combinations, groupby
from math import log2
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resens_fast import extension, planner_py, sweeps
from resens_fast.errors import PlanError, SweepError
from resens_fast.plan import HEAD, RESTORE, RUN, SAVE, SHORTCUT, Plan, Tape, plan
from resens_fast.structure import Structure

Letter = tuple[int, float]
Word = tuple[Letter, ...]


def planner(name: str) -> Any:
    if name == "python":
        return planner_py.Trie
    module = extension.module()
    assert module is not None, extension.reason()
    return module.Trie


@pytest.fixture(params=["native", "python"])
def trie_class(request: pytest.FixtureRequest) -> Any:
    return planner(request.param)


def arrays(words: list[list[tuple[int, float, int]]], blocks: int) -> tuple[Any, ...]:
    """Words of (block, gate, position) as the planner takes them."""
    letters = [letter for word in words for letter in word]
    return (
        np.cumsum([0, *map(len, words)]).astype(np.int64),
        np.array([b for b, _, _ in letters], dtype=np.int32),
        np.array([g for _, g, _ in letters], dtype=np.float32),
        np.array([p for _, _, p in letters], dtype=np.int32),
        blocks,
    )


def intact(n: int) -> list[tuple[int, float, int]]:
    return [(b, 1.0, b) for b in range(n)]


def plain(words: list[list[tuple[int, float, int]]]) -> list[Word]:
    return [tuple((b, float(np.float32(g)) + 0.0) for b, g, _ in word) for word in words]


@st.composite
def sweeps_of_words(draw: st.DrawFn) -> tuple[list[list[tuple[int, float, int]]], int]:
    """Deleted, permuted and scaled variants of a small network; often with common prefixes, duplicates, empty words."""
    n = draw(st.integers(1, 9))
    gate = st.sampled_from([1.0, 1.0, 1.0, 0.0, -0.0, 0.5, -1.0])
    words = []
    for _ in range(draw(st.integers(1, 14))):
        order = draw(st.permutations(range(n))) if draw(st.booleans()) else range(n)
        kept = draw(st.lists(st.booleans(), min_size=n, max_size=n))
        words.append([(b, draw(gate), p) for p, (b, keep) in enumerate(zip(order, kept, strict=True)) if keep])
    return words, n


def replay_tape(instructions: Any, gates: Any, slots: int) -> dict[int, Word]:
    state: Word = ()
    kept: dict[int, Word] = {}
    heads: dict[int, Word] = {}
    for (op, arg), gate in zip(instructions.tolist(), gates.tolist(), strict=True):
        if op in (SAVE, RESTORE):
            assert 0 <= arg < slots
        if op == SAVE:
            kept[arg] = state
        elif op == RESTORE:
            state = kept[arg]
        elif op in (RUN, SHORTCUT):
            assert (gate == 0) == (op == SHORTCUT)
            state = (*state, (arg, gate))
        else:
            assert op == HEAD
            assert arg not in heads, "a word is tallied twice"
            heads[arg] = state
    return heads


def replay_levels(steps: Any, gates: Any, buffers: int, levels: int) -> dict[int, Word]:
    """Runs the schedule the way an engine does: all reads of a level before its writes, then its HEADs."""
    content: dict[int, Word] = {0: ()}
    heads: dict[int, Word] = {}
    rows = list(zip(steps.tolist(), gates.tolist(), strict=True))
    assert [row[4] for row, _ in rows] == sorted(row[4] for row, _ in rows)
    assert {row[4] for row, _ in rows} == set(range(levels))
    for _, group in groupby(rows, key=lambda row: row[0][4]):
        here = list(group)
        # Equal (op, block) stand together, and HEADs come last.
        keys = [(op, 0 if op == HEAD else arg) for (op, arg, _, _, _), _ in here]
        assert keys == sorted(keys)
        runs = [(row, gate) for row, gate in here if row[0] != HEAD]
        read, written = {row[2] for row, _ in runs}, [row[3] for row, _ in runs]
        assert not read & set(written), "a level reads and writes the same buffer"
        assert len(set(written)) == len(written), "a level writes a buffer twice"
        assert all(0 <= b < buffers for b in (*read, *written))
        fresh = {dst: (*content[src], (arg, gate)) for (_, arg, src, dst, _), gate in runs}
        content.update(fresh)
        for (op, arg, src, dst, _), gate in here:
            if op == HEAD:
                assert (dst, gate) == (-1, 0)
                assert arg not in heads, "a word is tallied twice"
                heads[arg] = content[src]
            else:
                assert (gate == 0) == (op == SHORTCUT)
    return heads


def assert_exact(trie: Any, words: list[Word], budgets: Any) -> None:
    """Every configuration's word comes out of the tape and of each level schedule, once, and nothing else does."""
    assert trie.words == len(set(words))
    expected = {int(w): words[c] for c, w in enumerate(trie.word_of)}
    assert list(dict.fromkeys(trie.word_of.tolist())) == list(range(trie.words)), "not numbered by first appearance"
    tape = trie.tape()
    assert replay_tape(*tape) == expected
    assert tape[2] <= log2(trie.words) + 1
    assert (tape[0][:, 0] == RUN).sum() == trie.executed_runs
    assert trie.requested_runs == sum(g != 0 for word in words for _, g in word)
    prefixes = {word[: i + 1] for word in words for i in range(len(word))}
    assert trie.executed_runs == sum(p[-1][1] != 0 for p in prefixes), "a common prefix is not shared"
    for budget in budgets:
        levels = trie.levels(budget)
        assert levels[2] <= budget
        assert replay_levels(*levels) == expected
        assert (levels[0][:, 0] == RUN).sum() == trie.executed_runs, "a prefix runs twice"


@settings(max_examples=120, deadline=None)
@given(sweeps_of_words())
def test_replaying_the_native_schedules_gives_the_sweep(case: Any) -> None:
    words, n = case
    trie = planner("native")(*arrays(words, n))
    least = trie.least_budget()
    assert_exact(trie, plain(words), [*range(least, least + 8), 1000])


@settings(max_examples=120, deadline=None)
@given(sweeps_of_words())
def test_both_planners_agree_instruction_by_instruction(case: Any) -> None:
    words, n = case
    native, python = planner("native")(*arrays(words, n)), planner("python")(*arrays(words, n))
    for name in ("words", "requested_runs", "executed_runs"):
        assert getattr(native, name) == getattr(python, name)
    np.testing.assert_array_equal(native.word_of, python.word_of)
    assert native.least_budget() == python.least_budget()
    least = native.least_budget()
    for ours, theirs in [
        (native.tape(), python.tape()),
        *((native.levels(b), python.levels(b)) for b in (*range(least, least + 6), 100)),
    ]:
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(mine, other)
            assert getattr(mine, "dtype", int) == getattr(other, "dtype", int)


def fewest_buffers(words: set[Word]) -> int:
    """The child that needs most comes last and may have its parent's buffer; beside the others the parent stays."""
    needs = [
        fewest_buffers({word[1:] for word in words if word and word[0] == first})
        for first in {w[0] for w in words if w}
    ]
    if not needs:
        return 1
    most, *others = sorted(needs, reverse=True)
    return max([2, most, *(need + 1 for need in others)])


@settings(max_examples=100, deadline=None)
@given(sweeps_of_words())
def test_a_budget_that_is_too_small_names_the_smallest_that_works(case: Any) -> None:
    words, n = case
    for name in ("native", "python"):
        trie = planner(name)(*arrays(words, n))
        with pytest.raises(ValueError, match="too small") as caught:
            trie.levels(trie.least_budget() - 1)
        named = int(str(caught.value).rsplit(" ", 1)[1])
        assert named == trie.least_budget() == fewest_buffers(set(plain(words))) <= log2(trie.words) + 2
        assert trie.levels(named)[2] <= named


def test_duplicates_the_empty_word_and_prefixes(trie_class: Any) -> None:
    words = [intact(3), [], intact(2), intact(3), [], [(0, -0.0, 0)], [(0, 0.0, 0)]]
    trie = trie_class(*arrays(words, 3))
    assert trie.word_of.tolist() == [0, 1, 2, 0, 1, 3, 3]
    assert_exact(trie, plain(words), [trie.least_budget(), 10])


@pytest.mark.parametrize("length", [0, 1, 2000])
def test_one_configuration(trie_class: Any, length: int) -> None:
    """A single word needs no slot and two buffers, however long it is; nothing recurses over its letters."""
    trie = trie_class(*arrays([intact(length)], max(length, 1)))
    assert trie.tape()[2] == 0
    assert trie.least_budget() == (2 if length else 1)
    assert_exact(trie, plain([intact(length)]), [trie.least_budget()])


def test_a_deep_trie_with_branches(trie_class: Any) -> None:
    """Every twentieth block of 600 is deleted in turn: depth and number of branches grow together."""
    words = [[letter for letter in intact(600) if letter[0] != i] for i in range(0, 600, 20)]
    trie = trie_class(*arrays(words, 600))
    assert (trie.tape()[2], trie.least_budget()) == (1, 3)
    assert replay_levels(*trie.levels(3)).keys() == set(range(30))


def test_equal_positions_share_a_level(trie_class: Any) -> None:
    """All variants that delete one block need block j in the same level, although they have run different numbers."""
    words = [[letter for letter in intact(6) if letter[0] != i] for i in range(6)]
    steps = trie_class(*arrays(words, 6)).levels(100)[0]
    levels_of = {block: set(steps[(steps[:, 0] == RUN) & (steps[:, 1] == block), 4].tolist()) for block in range(6)}
    assert all(len(levels) == 1 for levels in levels_of.values()), levels_of


def test_a_larger_budget_gives_larger_batches(trie_class: Any) -> None:
    words = [[letter for letter in intact(20) if letter[0] not in pair] for pair in combinations(range(20), 2)]
    trie = trie_class(*arrays(words, 20))
    levels = [trie.levels(budget)[3] for budget in (trie.least_budget(), 16, 64, 1000)]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] > 10 * levels[2]
    assert levels[3] == 20


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({0: np.array([0], np.int64), 1: [], 2: [], 3: []}, "at least one configuration"),
        ({0: np.array([1, 2], np.int64)}, "first word offset is 1"),
        ({0: np.array([0, 3, 2], np.int64)}, "must not fall, but offset 2 is 2 after 3"),
        ({0: np.array([0, 3], np.int64)}, "last word offset is 3, but there are 2 letters"),
        ({1: [0, 7]}, "letter 1 names block 7, but the network has 2 blocks"),
        ({1: [-1, 0]}, "letter 0 names block -1"),
        ({3: [0, 2]}, "letter 1 stands at position 2"),
        ({2: [1, float("nan")]}, "letter 1 has a gate that is not a number"),
    ],
)
def test_contradictory_arrays_are_refused(trie_class: Any, change: dict[int, Any], sentence: str) -> None:
    given = list(arrays([intact(2)], 2))
    for index, value in change.items():
        given[index] = np.asarray(value, dtype=given[index].dtype)
    with pytest.raises(ValueError, match=sentence):
        trie_class(*given)


def keep_arrays(keep: np.ndarray) -> tuple[Any, ...]:
    """bool [C, n] as words of a network in which every deleted block drops."""
    offsets = np.concatenate([[0], keep.sum(axis=1).cumsum()]).astype(np.int64)
    blocks = np.nonzero(keep)[1].astype(np.int32)
    return offsets, blocks, np.ones(len(blocks), np.float32), blocks.copy(), keep.shape[1]


def test_a_hundred_thousand_configurations_need_few_slots() -> None:
    draws = np.random.RandomState(0).random_sample((100_000, 54))
    trie = planner("native")(*keep_arrays(draws.argsort(axis=1) >= 10))
    instructions, _, slots = trie.tape()
    assert trie.requested_runs == 4_400_000
    assert slots <= 17
    heads = instructions[instructions[:, 0] == HEAD, 1]
    assert np.array_equal(np.sort(heads), np.arange(trie.words))
    steps, _, buffers, _ = trie.levels(256)
    assert buffers <= 256
    assert np.array_equal(np.sort(steps[steps[:, 0] == HEAD, 1]), np.arange(trie.words))


def structure(n: int, drops: bool = True) -> Structure:
    shape = (16, 32, 32)
    return Structure(
        names=tuple(f"layer.{i}" for i in range(n)),
        stages=(1,) * n,
        kinds=("basic_preact",) * n,
        transitions=(False,) * n,
        deletable=(True,) * n,
        drops=(drops,) * n,
        gateable=(True,) * n,
        shapes_in=(shape,) * n,
        shapes_out=(shape,) * n,
        input_shape=(3, 32, 32),
        classes=10,
    )


def test_known_counts_for_54_blocks() -> None:
    net = structure(54)
    single = plan(net, sweeps.single(net) + sweeps.intact(net))
    assert single.requested_runs == 54 + 54 * 53
    assert round(single.requested_runs / single.executed_runs, 2) == 1.96
    pairs = plan(net, sweeps.pairs(net))
    assert (pairs.words, pairs.slots) == (1431, 2)
    assert round(pairs.requested_runs / pairs.executed_runs, 2) == 2.84


def test_a_deleted_block_that_does_not_drop_is_a_shortcut() -> None:
    net = structure(3, drops=False)
    tape = plan(net, sweeps.single(net)).tape()
    assert replay_tape(*tape) == {i: tuple((b, float(b != i)) for b in range(3)) for i in range(3)}
    assert (tape.instructions[:, 0] == SHORTCUT).sum() == 3


def test_the_listing_names_blocks_and_is_shortened() -> None:
    net = structure(54)
    text = str(plan(net, sweeps.single(net)))
    assert text.startswith("54 configurations of 54 blocks, 54 unique: 2,862 block runs asked for, 1,484 executed")
    assert "RUN 1 layer.1" in text
    assert "more instructions" in text
    assert len(text.splitlines()) == 62
    small = str(plan(structure(2), sweeps.from_gates(structure(2), np.array([[1, 0.5]]))))
    assert small.splitlines()[1:] == ["       0  RUN 0 layer.0", "       1  RUN 1 layer.1 x 0.5", "       2  HEAD 0"]


def test_state_bytes_counts_slots_and_the_state_in_progress() -> None:
    net = structure(54)
    assert plan(net, sweeps.pairs(net)).state_bytes(8, torch.bfloat16) == 3 * 8 * 16 * 32 * 32 * 2


def test_a_plan_refuses_another_network_and_too_small_a_budget() -> None:
    made = plan(structure(5), sweeps.single(structure(5)))
    with pytest.raises(PlanError, match="budget of 2 state buffers is too small for this plan; it needs at least 3"):
        made.levels(2)
    with pytest.raises(SweepError, match=r"5 blocks .* but the network has 6 blocks"):
        plan(structure(6), sweeps.single(structure(5)))


def test_without_the_extension_plans_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    net = structure(12)
    sweep = sweeps.delete_random(net, k=3, samples=20, seed=1)
    compiled = plan(net, sweep)
    monkeypatch.setattr(extension, "module", lambda: None)
    python = plan(net, sweep)
    assert isinstance(python._trie, planner_py.Trie)
    assert not isinstance(compiled._trie, planner_py.Trie)
    assert isinstance(python, Plan)
    assert isinstance(python.tape(), Tape)
    np.testing.assert_array_equal(python.tape().instructions, compiled.tape().instructions)
    np.testing.assert_array_equal(python.word_of, compiled.word_of)
