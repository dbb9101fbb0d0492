"""The paths of the unraveled view, studies of their gradients, their figures and commands."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

import resens_fast as rf
from resens_fast import path_figures, paths, sweeps
from resens_fast.errors import StudyError, SweepError
from tests.conftest import small_resnet
from tests.test_cli import call, nets, refused, small  # noqa: F401 nets is a fixture


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.data())
def test_counts_are_exact_for_any_depth(n: int, data: st.DataObject) -> None:
    x, deleted = data.draw(st.integers(0, n)), data.draw(st.integers(0, n))
    assert paths.distribution(n)[x] == float(Fraction(math.comb(n, x), 2**n))
    assert paths.surviving(n, deleted)[x] == float(Fraction(math.comb(n - deleted, x), math.comb(n, x)))
    assert paths.log_counts(n)[x] == pytest.approx(math.log(math.comb(n, x)), rel=1e-15)


def test_the_papers_numbers() -> None:
    assert paths.fraction(54, 5, 17) == pytest.approx(0.004537, abs=5e-7)
    assert paths.fraction(54, 19, 35) > 0.95
    assert paths.surviving(54, 10)[11] == pytest.approx(0.080, abs=5e-4)
    assert paths.distribution(1000).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("n", "fall"), [(10, 0.5), (54, 1.0), (1000, 0.7)])
def test_influence_and_range_against_whole_numbers(n: int, fall: float) -> None:
    """Norms exp(-fall x): the influence is a binomial with p = 1 / (1 + e^fall)."""
    x = np.arange(n + 1)
    p = 1 / (1 + math.exp(fall))
    expected = np.exp(paths.log_counts(n) + x * math.log(p) + (n - x) * math.log1p(-p))
    norms = np.exp(-fall * x)
    np.testing.assert_allclose(paths.influence(x, norms, n), expected, rtol=1e-9, atol=1e-300)
    found = paths.effective_range(x, norms, n)
    carried = expected[found.low : found.high + 1].sum()
    assert found.carried == pytest.approx(carried) and carried >= 0.95
    width = found.high - found.low + 1
    assert max(expected[i : i + width - 1].sum() for i in range(n + 2 - width)) < 0.95  # none shorter would do
    assert found.paths == pytest.approx(math.fsum(paths.distribution(n)[found.low : found.high + 1]))
    order = np.random.RandomState(0).permutation(n + 1)
    assert paths.effective_range(x[order], norms[order], n) == pytest.approx(found)
    sparse = x[:: n // 5]
    assert paths.effective_range(sparse, norms[sparse], n)[:2] == found[:2]  # the gaps are interpolated
    assert paths.slope(x, norms) == pytest.approx((-fall, 0, 1), abs=1e-9)


def test_the_whole_share_needs_every_length_that_has_some() -> None:
    assert paths.effective_range([0, 1, 2, 3], [0, 1, 1, 0], 3, share=1) == (1, 2, 1.0, 0.75)
    assert paths.slope([0, 1, 2], [math.e, 1, 0])[:2] == pytest.approx((-1, 1))


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: paths.distribution(-1), "n must be a whole number of at least 0, not -1"),
        (lambda: paths.distribution(2.5), "not 2.5"),
        (lambda: paths.surviving(5, 6), "cannot delete 6 of 5 blocks"),
        (lambda: paths.influence([0, 6], [1, 1], 5), "no path of length 6 through 5 blocks"),
        (lambda: paths.influence([0, 0], [1, 1], 5), "length 0 is given 2 times"),
        (lambda: paths.influence([0, 1], [1, np.nan], 5), "a mean norm is nan"),
        (lambda: paths.influence([0, 1], [1, -1], 5), "a mean norm is -1.0"),
        (lambda: paths.influence([0, 1], [0, 0], 5), "every mean norm is 0"),
        (lambda: paths.influence([], [], 5), "two rows of one length"),
        (lambda: paths.effective_range([0, 1], [1, 1], 5, share=0), "share must lie above 0"),
        (lambda: paths.slope([3], [1.0]), "two lengths or more"),
        (lambda: paths.influence([0, 1], ["a", "b"], 5), "norms must be numbers, not <U1"),
        (lambda: paths.influence([0, 1], [1, 1], "5"), "n must be a whole number of at least 0, not '5'"),
        (lambda: paths.effective_range([0, 1], [1, 1], 5, share="all"), "share must lie above 0 and .*, not 'all'"),
        (lambda: paths.fraction(54, 17, 5), "low is 17 and high is 5: give the shorter length first"),
        (lambda: paths.by_length(3), "a study of path gradients is needed, not 3"),
    ],
)
def test_what_cannot_be(call: object, what: str) -> None:
    with pytest.raises((StudyError, SweepError), match=what):
        call()  # type: ignore[operator]


def make() -> rf.ResidualNetwork:
    return rf.wrap(small_resnet(), torch.zeros(1, 3, 16, 16))


def test_sweeps_of_paths() -> None:
    net = rf.wrap(small_resnet(depth=20), torch.zeros(1, 3, 16, 16))
    sweep = sweeps.paths(net, samples=20)
    entered = (sweep.gates == 1).sum(axis=1)
    assert (entered == sweep.k).all() and set(np.unique(sweep.gates)) == {0, 1}
    counts = [min(20, math.comb(9, k)) for k in range(10)]
    assert np.bincount(sweep.k).tolist() == counts
    for k in (1, 8):  # few enough to take them all
        assert len({row.gates for row in sweep.take(np.flatnonzero(sweep.k == k))}) == 9
    alone = sweeps.paths(net, 4, samples=5)
    assert np.array_equal(alone.gates, sweep.gates[sweep.k == 4][:5])
    assert not np.array_equal(alone.gates, sweeps.paths(net, 4, samples=5, seed=1).gates)
    assert len(sweeps.paths(net, [4, 2, 4], samples=5)) == 10  # drawn twice it would only look like more paths
    many = sweeps.paths(net, 4, samples=125)
    share = many.gates.mean(axis=0)
    assert abs(share - 4 / 9).max() < 5 * math.sqrt(4 / 9 * 5 / 9 / 125)
    for wrong in (10, -1, 2.5, []):
        with pytest.raises(SweepError):
            sweeps.paths(net, wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["first_block", "parameters"])
def test_a_study_is_resumed_and_read_back(
    norm: str, images: torch.Tensor, labels: torch.Tensor, tmp_path: Path
) -> None:
    net = make()

    def run(data: object, out: Path | None, **more: object) -> rf.Study:
        options = {"lengths": [0, 2, 6], "samples": 3, "batch": 4, "engine": "torch", "norm": norm, **more}
        return rf.path_gradients(net, data, out=out, progress=False, **options)  # type: ignore[arg-type]

    class Stopping(torch.utils.data.TensorDataset):
        at = 9

        def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
            if i == self.at:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    data = Stopping(images[:14], labels[:14])
    with pytest.raises(KeyboardInterrupt):
        run(torch.utils.data.DataLoader(data, batch_size=1), tmp_path / "a")
    stopped = rf.open_study(tmp_path / "a")
    assert stopped.images == 8 and not stopped.complete
    with pytest.warns(UserWarning, match="incomplete: 8 of 14 images"):
        assert len(stopped.frame) == 2 * 5
    kept = {p: p.read_bytes() for p in (tmp_path / "a" / "parts").iterdir()}
    data.at = -1
    study = run(torch.utils.data.DataLoader(data, batch_size=1), tmp_path / "a")
    assert {p: p.read_bytes() for p in kept} == kept
    whole = run((images[:14], labels[:14]), None)
    read = rf.open_study(tmp_path / "a")
    for one in (study, read):
        pd.testing.assert_frame_equal(one.frame, whole.frame, rtol=1e-5)
    assert read.frame["images"].tolist() == [4, 4, 4, 2] * 5
    assert read.frame["length"].tolist() == [0] * 4 + [2] * 12 + [6] * 4
    assert read.frame["sample"].tolist() == [s for s in (0, 0, 1, 2, 0) for _ in range(4)]
    if norm == "parameters":
        pd.testing.assert_frame_equal(read.by_block, whole.by_block, rtol=1e-5)  # type: ignore[attr-defined]
    else:
        with pytest.raises(StudyError, match="was taken at first_block; use norm="):
            read.by_block  # type: ignore[attr-defined]  # noqa: B018
    data_again = (images[:14], labels[:14])
    for changed, what in (({"batch": 7}, "batches of 4"), ({"norm": "image"}, f"at {norm}"), ({"seed": 1}, "sweep")):
        with pytest.raises(StudyError, match=what):
            run(data_again, tmp_path / "a", **changed)
    with pytest.raises(StudyError, match="holds a study of gradients .*, this is one of errors"):
        rf.evaluate(net, sweeps.intact(net), data_again, out=tmp_path / "a", progress=False)


def test_means_are_over_images_then_paths(images: torch.Tensor, labels: torch.Tensor) -> None:
    net = make()
    study = rf.path_gradients(
        net, (images[:10], labels[:10]), [0, 2], samples=4, batch=4, engine="torch", progress=False
    )
    gradients = rf.input_gradients(net, study.sweep, images[:10], labels[:10], engine="torch")
    each = gradients.double().flatten(2).norm(dim=2).numpy()
    np.testing.assert_allclose(study.by_length["mean"], [each[0].mean(), each[1:].mean()], rtol=1e-5)
    np.testing.assert_allclose(study.by_length["sd"][1], each[1:].mean(axis=1).std(ddof=1), rtol=1e-4)
    first = study.frame[study.frame["batch"] == 0]
    np.testing.assert_allclose(first["norm"], each[:, :4].mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(first["sd"], each[:, :4].std(axis=1), rtol=1e-3)
    entered = study.sweep.gates[:, net.structure.transitions] != 0
    assert first["transitions"].tolist() == entered.sum(axis=1).tolist()


def test_lengths_that_were_not_measured(images: torch.Tensor, labels: torch.Tensor) -> None:
    """They share in the influence, as in the effective range; a figure tells them from those that were."""
    study = rf.path_gradients(make(), (images[:6], labels[:6]), [1, 4, 6], norm="parameters", progress=False)
    table = study.by_length
    every, value = paths.every_length(table["length"], table["mean"], 6)
    shares = paths.influence(every, value, 6)
    np.testing.assert_allclose(table["influence"], shares[[0, 3, 5]])
    assert table["influence"].sum() < 1
    drawn = path_figures.draw_gradients(study)
    (line,) = [line for line in drawn["gradient-influence"].axes[0].lines if "measured" in str(line.get_label())]
    np.testing.assert_allclose(np.asarray(line.get_ydata(), float), 100 * shares)
    assert np.flatnonzero(line.get_markevery()).tolist() == [0, 3, 5]
    axes = drawn["gradient-by-block"].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "4", "6"]
    assert axes.get_ylim() == (-0.5, 2.5)


def test_a_dot_is_the_mean_over_finite_images(images: torch.Tensor, labels: torch.Tensor) -> None:
    broken = images[:6].clone()
    broken[1] = torch.nan
    net = make()
    study = rf.path_gradients(net, (broken, labels[:6]), [2], samples=4, batch=3, progress=False)
    rest = [0, 2, 3, 4, 5]
    whole = rf.path_gradients(net, (images[rest], labels[rest]), [2], samples=4, progress=False)
    (dots,) = [c for c in path_figures.norms(study).axes[0].collections if c.get_label() == "path"]
    np.testing.assert_allclose(np.asarray(dots.get_offsets())[:, 1], whole.frame["norm"], rtol=1e-5)


def test_many_lengths_are_an_area_not_bars() -> None:
    assert len(path_figures.path_lengths(54).axes[0].patches) == 55
    figure = path_figures.path_lengths(5000)
    assert not figure.axes[0].patches
    assert "95" in figure.legends[0].get_texts()[1].get_text()


def test_figures_hold_the_studys_numbers(images: torch.Tensor, labels: torch.Tensor, tmp_path: Path) -> None:
    net = make()
    study = rf.path_gradients(net, (images[:6], labels[:6]), samples=6, norm="parameters", progress=False)
    drawn = path_figures.draw_gradients(study, "a network", "a note")
    assert list(drawn) == ["path-lengths", "gradient-norms", "gradient-influence", "gradient-by-block"]
    table = study.by_length
    axes = drawn["gradient-norms"].axes[0]
    assert axes.get_yscale() == "log"
    (mean,) = [line for line in axes.lines if line.get_label() == "mean"]
    np.testing.assert_allclose(np.asarray(mean.get_ydata(), float), table["mean"])
    assert len(axes.collections[0].get_offsets()) == len(study.sweep)
    found = paths.effective_range(table["length"], table["mean"], 6)
    assert any(
        f"{found.low} to {found.high} blocks" in text.get_text()
        for text in drawn["gradient-influence"].legends[0].get_texts()
    )
    study.plot(tmp_path / "one.png")
    assert imread(tmp_path / "one.png").std() > 0.01


def test_the_gradients_command_leaves_tables_figures_and_study(nets: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "a"
    result = small(nets, out, "--samples", 3, "--batch", 8, command="gradients")
    assert result.exit_code == 0, result.output
    for text in ("Gradient norm by path length", "log norm falls by", "of the gradient comes from paths of"):
        assert text in result.output
    for stem in ("path-lengths", "gradient-norms", "gradient-influence"):
        assert (out / f"{stem}.png").is_file() and (out / f"{stem}.svg").is_file()
    frame = pd.read_parquet(out / "results.parquet")
    pd.testing.assert_frame_equal(frame, rf.open_study(out).frame)
    again = small(nets, out, "--samples", 3, "--batch", 8, command="gradients")
    assert again.exit_code == 0
    assert call("show", out, "--all").exit_code == 0
    line = small(nets, out, "--samples", 3, "--batch", 9, command="gradients")
    assert line.exit_code == 2 and "batches of 8 images" in line.stderr
    here = ("gradients", f"{nets}:small", "--data", "digits", "--limit-images", 8, "--out", tmp_path / "b")
    assert "not at 'middle'" in refused(*here, "--norm", "middle")
    assert "no path of length 4" in refused(*here, "--lengths", "0:9")
    some = small(nets, tmp_path / "c", "--lengths", "0,3", command="gradients")
    assert "2 paths through 3 blocks" in some.output
    assert "along paths of 0 to 3 blocks (2 lengths measured, interpolated between them) comes from" in some.output
    one = small(nets, tmp_path / "d", "--lengths", 3, command="gradients")
    assert "1 path through 3 blocks" in one.output
    assert not (tmp_path / "b").exists()


def test_the_paths_command_needs_no_images(nets: Path, tmp_path: Path) -> None:  # noqa: F811
    result = call("paths", f"{nets}:small", "--out", tmp_path / "a", "--deleted", "1,2")
    assert result.exit_code == 0, result.output
    assert "2^3 paths through 3 blocks" in result.output
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        f"{stem}.{kind}" for stem in ("path-lengths", "surviving-paths") for kind in ("png", "svg")
    }
    result = call("paths", f"{nets}:small", "--out", tmp_path / "c")  # 1 of the usual 1, 5, 10 and 20
    assert result.exit_code == 0
    assert "left after 1, %" in result.output
    assert "left after 5" not in result.output
    assert "1000 blocks" in call("paths", 1000, "--out", tmp_path / "a").output
    assert "at most five numbers up to 3" in refused("paths", f"{nets}:small", "--out", tmp_path / "b", "--deleted", 4)
    assert "0 blocks" in refused("paths", 0, "--out", tmp_path / "b")
    assert "100,000 blocks with shortcuts; give 1 to 10,000" in refused("paths", 100_000, "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists()
