"""The demo: chooses what this machine has, says why, comes back to what is there, refuses another demo's folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import resens_fast as rf
from resens_fast import demo
from resens_fast.cli import app
from resens_fast.data import CIFAR10_CLASSES


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["demo", *map(str, arguments)])


@pytest.fixture
def nothing_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without CIFAR-10 and without a network."""

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RESENS_FAST_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", offline)
    return tmp_path


def fake_cifar(root: Path) -> Path:
    """Three images per class under CIFAR-10's class names."""
    random = np.random.RandomState(0)
    for name in CIFAR10_CLASSES:
        (root / "test" / name).mkdir(parents=True)
        for number in range(3):
            pixels = random.randint(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "test" / name / f"{number}.png")
    return root


def test_without_cifar_it_runs_on_digits_and_comes_back(nothing_found: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "QUICK_SECONDS", 0.0)  # the fewest images
    result = call("--quick", "--out", "out")
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert "The demo runs ResNet-20 on scikit-learn's digits (CIFAR-10 is not in " in text
    assert "cannot be downloaded (no network)" in text
    assert "Using 100 test images" in text
    for part in ("intact error", "One block deleted, transitions", "k blocks deleted", "Blocks reordered"):
        assert part in text
    files = [Path(line.strip()) for line in text.split("Everything is in out")[1].splitlines()[1:-1]]
    assert len(files) == 8
    assert all(path.is_file() and path.stat().st_size > 1000 for path in files)
    studies = [rf.open_study(Path("out") / part) for part in ("lesion", "reorder")]
    assert [study.complete for study in studies] == [True, True]
    assert studies[0].frame["k"].max() == 9, "k goes up to the number of blocks"
    # Again: nothing is measured or computed anew, the answers are the same.
    monkeypatch.setattr(demo, "_affordable", lambda *_: pytest.fail("chose again"))
    parts = {p: p.stat().st_mtime_ns for p in Path("out").glob("*/parts/*")}
    again = call("--quick", "--out", "out")
    assert again.exit_code == 0, again.output
    assert "Going on with the demo in out" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in Path("out").glob("*/parts/*")} == parts
    other = call("--out", "out")
    assert other.exit_code == 2
    assert "holds a demo with other options (resens demo --quick --data digits)" in other.stderr
    assert other.stderr.count("\n") == 1


def test_cifar_on_this_machine_is_preferred(nothing_found: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESENS_FAST_DATA", str(fake_cifar(nothing_found / "cifar")))
    monkeypatch.setattr(demo, "_affordable", lambda *_: 30)
    choice = demo._choose(nothing_found / "out", True, None)
    assert (choice.model, choice.data) == ("resnet110-cifar10", f"cifar10:{nothing_found / 'cifar'}")
    assert choice.contrast in (None, "vgg15-cifar10")
    assert demo._read(nothing_found / "out", True, None) == choice


def test_the_contrast_figure_has_both_networks(nothing_found: Path) -> None:
    digits = rf.data.open("digits", limit=20)
    study = {}
    for name, model in (
        ("residual", rf.models.resnet(8, width=4, in_channels=1)),
        ("plain", rf.models.vgg(9, width=4, in_channels=1)),
    ):
        images, labels = digits.tensors()
        net = rf.wrap(model, images.repeat_interleave(4, 2).repeat_interleave(4, 3)[:1])
        big = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
        study[name] = rf.evaluate(net, rf.sweeps.intact(net) + rf.sweeps.single(net), (big, labels), progress=False)
    choice = demo.Choice("cifar10", "residual", "plain", 20, True)
    written = demo._contrast(list(study.items()), nothing_found, choice)
    assert [path.name for path in written] == ["contrast.png", "contrast.svg"]


def test_data_that_was_asked_for_and_is_not_there_is_an_error(nothing_found: Path) -> None:
    for data, message in (
        ("cifar10:/nowhere", "/nowhere"),
        ("fashion-mnist", "digits or cifar10, not 'fashion-mnist'"),
    ):
        result = call("--data", data, "--out", "out")
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert not Path("out").exists()


def test_a_folder_with_other_files_or_a_damaged_choice_is_refused(nothing_found: Path) -> None:
    (nothing_found / "a").mkdir()
    (nothing_found / "a" / "thesis.tex").touch()
    assert "holds other files and no demo" in call("--out", "a").stderr
    (nothing_found / "a" / "demo.json").write_text("{")
    assert "demo.json is damaged" in call("--out", "a").stderr
    (nothing_found / "b").touch()
    assert "is a file" in call("--out", "b").stderr
