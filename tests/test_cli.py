"""The command line: what each command leaves behind, one line and exit code 2 for every mistake, and resuming."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import resens_fast as rf
from resens_fast.cli import app

FACTORIES = """
import torch
from resens_fast import models

def small():
    torch.manual_seed(0)
    return models.resnet(8, width=4, in_channels=1)

def colour():
    return models.resnet(8, width=4)

def two_classes():
    return models.resnet(8, width=4, classes=2)

def broken():
    raise RuntimeError("no weights here")

def needs(argument):
    pass

def number():
    return 3

value = 3

def linear():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
"""


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nets") / "factories_for_cli.py"
    path.write_text(FACTORIES)
    return path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(*arguments: object) -> str:
    """The one line a mistake ends in; exit code 2, nothing else on standard error, no traceback."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("resens: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr.removeprefix("resens: ").strip()


def small(nets: Path, out: Path, *options: object, command: str = "lesion", limit: int = 30) -> Result:
    return call(command, f"{nets}:small", "--data", "digits", "--limit-images", limit, "--out", out, *options)


def contents(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.name != ".lock"}


def test_lesion_prints_tables_and_leaves_study_figures_and_table(nets: Path, tmp_path: Path) -> None:
    result = small(nets, tmp_path / "a", "--single", "--delete", "1:2", "--samples", 3)
    assert result.exit_code == 0, result.output
    assert "no --checkpoint: the weights are those that" in result.output
    text = result.stdout
    assert text.index("intact error") < text.index("One block deleted, transitions") < text.index("k blocks deleted")
    assert "\x1b" not in text
    assert contents(tmp_path / "a") == {
        "manifest.json", "sweep.parquet", "parts", "run.json", "results.parquet",
        "single-deletions.png", "single-deletions.svg", "deletions-against-k.png", "deletions-against-k.svg",
    }  # fmt: skip
    table = pd.read_parquet(tmp_path / "a" / "results.parquet")
    study = rf.open_study(tmp_path / "a")
    assert table["errors"].tolist() == study.frame["errors"].tolist()
    assert table["kind"].value_counts().to_dict() == {"intact": 1, "delete": 3 + 6}
    assert [tuple(d) for d in table["deleted"]] == study.frame["deleted"].tolist()
    assert json.loads((tmp_path / "a" / "run.json").read_text())["data"] == "digits (test)"


def test_lesion_deletes_single_blocks_unless_told_otherwise(nets: Path, tmp_path: Path) -> None:
    assert small(nets, tmp_path / "a").exit_code == 0
    assert [(k, d) for k, d in zip(*rf.open_study(tmp_path / "a").frame[["k", "deleted"]].values.T, strict=True)] == [
        (0, ()), (1, (0,)), (1, (1,)), (1, (2,)),
    ]  # fmt: skip
    assert small(nets, tmp_path / "b", "--pairs").exit_code == 0
    assert rf.open_study(tmp_path / "b").frame["k"].tolist() == [0, 2, 2, 2]
    assert (tmp_path / "b" / "pair-deletions.svg").is_file()


def test_no_transitions_keeps_them(nets: Path, tmp_path: Path) -> None:
    assert small(nets, tmp_path / "a", "--delete", 1, "--samples", 20, "--no-transitions").exit_code == 0
    assert set(rf.open_study(tmp_path / "a").frame["deleted"]) == {(), (0,)}


def test_reorder_and_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mynet_for_cli.py").write_text(
        "from resens_fast import models\ndef make():\n    return models.resnet(20, width=4, in_channels=1)\n"
    )
    options = ("--data", "digits", "--limit-images", 20, "--swaps", "1,3", "--samples", 2, "--out", "run")
    result = call("reorder", "mynet_for_cli:make", *options)
    assert result.exit_code == 0, result.output
    assert "Blocks reordered, by Kendall's tau" in result.stdout
    (tmp_path / "run" / "error-against-tau.svg").unlink()
    shown = call("show", "run")
    assert shown.exit_code == 0
    assert (tmp_path / "run" / "error-against-tau.svg").is_file()
    assert shown.stdout.strip() in result.stdout


def test_the_same_command_again_uses_what_is_there(nets: Path, tmp_path: Path) -> None:
    first = small(nets, tmp_path / "a")
    parts = {p: p.stat().st_mtime_ns for p in (tmp_path / "a" / "parts").iterdir()}
    assert small(nets, tmp_path / "a").stdout == first.stdout
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a" / "parts").iterdir()} == parts


@pytest.mark.parametrize(("suffix", "wrap"), [("safetensors", None), ("pt", None), ("pth", "state_dict")])
def test_checkpoints_of_every_kind_give_the_networks_own_answers(
    nets: Path, tmp_path: Path, suffix: str, wrap: str | None
) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(5)
    other = rf.models.resnet(8, width=4, in_channels=1).eval()
    state = {f"module.{k}": v for k, v in other.state_dict().items()}
    path = tmp_path / f"weights.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save({wrap: state} if wrap else state, path)
    assert small(nets, tmp_path / "a", "--checkpoint", path).exit_code == 0
    expected = rf.evaluate(
        rf.wrap(other, torch.zeros(1, 1, 8, 8)),
        rf.sweeps.intact(rf.wrap(other, torch.zeros(1, 1, 8, 8))),
        rf.data.open("digits", limit=30),
    )
    assert rf.open_study(tmp_path / "a").frame["errors"][0] == expected.frame["errors"][0]
    assert rf.open_study(tmp_path / "a").frame["loss"][0] == pytest.approx(expected.frame["loss"][0], rel=1e-4)


def test_mean_and_std_reach_the_images(nets: Path, tmp_path: Path) -> None:
    assert small(nets, tmp_path / "a", "--mean", "0.1", "--std", "0.9").exit_code == 0
    assert small(nets, tmp_path / "b").exit_code == 0
    assert rf.open_study(tmp_path / "a").frame["loss"][0] != rf.open_study(tmp_path / "b").frame["loss"][0]


def test_a_trained_folder_is_a_model(tmp_path: Path) -> None:
    out = tmp_path / "net"
    options = (
        "--data",
        "digits",
        "--epochs",
        1,
        "--batch",
        32,
        "--limit-images",
        64,
        "--dtype",
        "float32",
        "--out",
        out,
    )
    result = call("train", "resnet8", *options)
    assert result.exit_code == 0, result.output
    assert "test error" in result.stdout
    assert call("lesion", out, "--data", "digits", "--limit-images", 20, "--out", tmp_path / "study").exit_code == 0
    assert "already holds a training run" in refused("train", "resnet8", *options)
    (out / "card.json").write_text("{")
    assert "card.json is damaged" in refused("lesion", out, "--data", "digits", "--out", tmp_path / "other")


def test_help_names_every_command_and_version_prints() -> None:
    text = call("--help").stdout
    for command in ("lesion", "reorder", "train", "gates", "show", "doctor", "demo"):
        assert command in text
        assert call(command, "--help").exit_code == 0
    assert rf.__version__ in call("--version").stdout


def test_doctor_lists_engines_and_gives_json() -> None:
    assert "torch" in call("doctor").stdout
    assert json.loads(call("doctor", "--json").stdout)


# ---- mistakes ----


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--delete", "5:3", "'5:3' is empty: 3 is below 5, write 3:5"),
        ("--delete", "a:b", "'a:b' is not a number or a range"),
        ("--delete", "1:2:3:4", "'1:2:3:4' is not a number or a range"),
        ("--delete", "", "'' is not a number or a range"),
        ("--delete", "0:3", "starts at 0"),
        ("--delete", "1:3:0", "the step 0"),
        ("--delete", "4", "cannot delete k = 4 blocks: the network has 3 deletable blocks"),
        ("--samples", "0", "--samples"),
        ("--seed", "99999999999", "99999999999"),
        ("--limit-images", "0", "--limit-images"),
        ("--engine", "warp", "unknown engine 'warp'"),
        ("--dtype", "float8", "no dtype 'float8'"),
        ("--device", "warp", "device 'warp'"),
        ("--mean", "0.1", "--mean and --std belong together"),
        ("--std", "0", "not positive"),
        ("--mean", "a", "'a' is not a list of numbers"),
        ("--image-size", "axb", "'axb' is not a size"),
        ("--what", "1", "--what"),
    ],
)
def test_wrong_options_are_one_line(nets: Path, tmp_path: Path, option: str, value: str, message: str) -> None:
    more = ["--delete", "1"] if option in ("--seed", "--samples") else []
    where = ("lesion", f"{nets}:small", "--data", "digits", "--out", tmp_path / "a", *more)
    assert message in refused(*where, option, value)
    assert not (tmp_path / "a").exists(), "a refused command left its folder behind"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("colour", "digits (test) has images of 1 channel, but"),
        ("broken", "failed with RuntimeError (no weights here)"),
        ("needs", "failed with TypeError"),
        ("number", "returned a int, not a torch.nn.Module"),
        ("value", "is a int, not a function"),
        ("missing", "has nothing called 'missing'"),
        ("linear", ""),
    ],
)
def test_wrong_factories_are_one_line(nets: Path, tmp_path: Path, name: str, message: str) -> None:
    assert message in refused("lesion", f"{nets}:{name}", "--data", "digits", "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_unknown_networks_data_and_modules_are_one_line(nets: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "a")
    assert "resnet9000" in refused("lesion", "resnet9000", "--data", "digits", *out)
    assert "no_such_module" in refused("lesion", "no_such_module:f", "--data", "digits", *out)
    assert "nowhere.py" in refused("lesion", "nowhere.py:f", "--data", "digits", *out)
    assert "'mnist'" in refused("lesion", f"{nets}:small", "--data", "mnist", *out)
    assert "/nowhere" in refused("lesion", f"{nets}:colour", "--data", "folder:/nowhere", *out)
    assert "no architecture 'alexnet'" in refused("train", "alexnet", "--data", "digits", *out)
    assert "depth 9" in refused("train", "resnet9", "--data", "digits", *out)
    assert "No such command" in refused("lesoin")


def test_checkpoints_that_do_not_fit_are_one_line(nets: Path, tmp_path: Path) -> None:
    state = rf.models.resnet(8, width=4, in_channels=1).state_dict()
    key = next(iter(state))

    def complaint(name: str) -> str:
        return refused(
            "lesion", f"{nets}:small", "--checkpoint", tmp_path / name, "--data", "digits", "--out", tmp_path / "a"
        )

    torch.save({k: v for k, v in state.items() if k != key}, tmp_path / "less.pt")
    torch.save({**state, "surplus": torch.zeros(1)}, tmp_path / "more.pt")
    torch.save({**state, key: torch.zeros(1, 2)}, tmp_path / "shape.pt")
    torch.save({"epoch": 3}, tmp_path / "nothing.pt")
    torch.save({"object": Path}, tmp_path / "code.pt")
    torch.save(state, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:900])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "cut.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    assert f"it lacks {key}" in complaint("less.pt")
    assert "the network has no surplus" in complaint("more.pt")
    assert f"{key} has the shape [1, 2], the network's has" in complaint("shape.pt")
    assert "holds no state_dict" in complaint("nothing.pt")
    assert "more than tensors" in complaint("code.pt")
    assert "no readable checkpoint" in complaint("cut.pt")
    assert "is empty" in complaint("empty.pt")
    assert "no readable checkpoint" in complaint("cut.safetensors")
    assert "there is no checkpoint" in complaint("absent.pt")
    assert not (tmp_path / "a").exists()


def folder(root: Path, classes: int, size: int = 16) -> Path:
    for label in range(classes):
        (root / f"c{label}").mkdir(parents=True)
        noise = np.random.RandomState(label).randint(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"c{label}" / "0.png")
    return root


def test_wrong_images_are_one_line(nets: Path, tmp_path: Path) -> None:
    def complaint(path: Path) -> str:
        return refused(
            "lesion", f"{nets}:two_classes", "--image-size", 16, "--data", f"folder:{path}", "--out", tmp_path / "a"
        )

    assert "three has 3 classes, but" in complaint(folder(tmp_path / "three", 3))
    assert "one has 1 class, but" in complaint(folder(tmp_path / "one", 1))
    (folder(tmp_path / "cut", 2) / "c1" / "0.png").write_bytes(b"\x89PNG\r\n")
    assert "0.png" in complaint(tmp_path / "cut")
    (folder(tmp_path / "void", 2) / "c1" / "0.png").unlink()
    assert "no images" in complaint(tmp_path / "void")
    (tmp_path / "none").mkdir()
    assert "none" in complaint(tmp_path / "none")
    assert "8 x 8" in complaint(folder(tmp_path / "tiny", 2, 8))
    assert not (tmp_path / "a").exists()


def test_another_study_or_other_files_in_the_folder_are_one_line(nets: Path, tmp_path: Path) -> None:
    assert small(nets, tmp_path / "a").exit_code == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir() if p.is_file()}
    again = ("lesion", f"{nets}:small", "--data", "digits", "--out", tmp_path / "a")
    assert "holds a study of another sweep" in refused(*again, "--limit-images", 30, "--pairs")
    assert "holds a study of 30 images" in refused(*again, "--limit-images", 20)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir() if p.is_file()} == before
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    assert "thesis.tex" in refused("lesion", f"{nets}:small", "--data", "digits", "--out", tmp_path / "b")
    (tmp_path / "c").touch()
    assert "is a file" in refused("lesion", f"{nets}:small", "--data", "digits", "--out", tmp_path / "c")
    assert "holds no study" in refused("show", tmp_path / "b")
    (tmp_path / "a" / "manifest.json").write_text("{")
    assert "manifest.json is damaged" in refused("show", tmp_path / "a")


def test_no_space_left_is_one_line_and_the_call_can_be_repeated(
    nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def no_space(*_: object, **__: object) -> None:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", no_space)
        message = refused("lesion", f"{nets}:small", "--data", "digits", "--limit-images", 30, "--out", tmp_path / "a")
    assert "no space left to write" in message
    assert str(tmp_path / "a") in message
    with monkeypatch.context() as patch:
        patch.setattr("pyarrow.parquet.write_table", no_space)
        message = refused("lesion", f"{nets}:small", "--data", "digits", "--limit-images", 30, "--out", tmp_path / "b")
    assert "no space left" in message
    assert str(tmp_path / "b") in message
    assert not list(tmp_path.glob("*/*.unfinished"))
    for name in ("a", "b"):
        assert small(nets, tmp_path / name).exit_code == 0


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = call("--debug", "show", tmp_path / "nowhere")
    assert "Traceback" in result.stderr
    assert "StudyError" in result.stderr
    assert result.exit_code == 2


def test_an_error_of_ours_is_not_dressed_up_as_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("resens_fast.commands.run.show", bug)
    assert isinstance(call("show", tmp_path).exception, KeyError)
