"""What lies in a study's folder: files of others stay as they are, and no damage goes unnoticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import resens_fast as rf
from resens_fast import sweeps
from resens_fast.errors import StudyError


def test_folders_that_are_not_ours(
    net: rf.ResidualNetwork, images: torch.Tensor, labels: torch.Tensor, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StudyError, match="is a file"):
        rf.evaluate(net, sweeps.single(net), (images, labels), out=tmp_path / "file", progress=False)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("x")
    with pytest.raises(StudyError, match=r"other files \(notes.txt\)"):
        rf.evaluate(net, sweeps.single(net), (images, labels), out=tmp_path / "used", progress=False)
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["notes.txt"]


def test_files_of_the_same_names_are_not_ours(
    net: rf.ResidualNetwork, images: torch.Tensor, labels: torch.Tensor, tmp_path: Path
) -> None:
    """A sweep.parquet of somebody's own, alone or beside other things, is neither replaced nor removed."""
    kept = {"sweep.parquet": b"learning rates", "notes.txt": b"x", ".lock": b"1234"}
    for names, refusal in (
        (["sweep.parquet"], "sweep.parquet"),
        (["sweep.parquet", ".lock", "notes.txt"], r"(sweep.parquet|notes.txt)"),
    ):
        folder = tmp_path / str(len(names))
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(kept[name])
        with pytest.raises(StudyError, match=rf"other files \({refusal}\) and no study"):
            rf.evaluate(net, sweeps.single(net), (images, labels), out=folder, progress=False)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == {name: kept[name] for name in names}


def test_a_study_without_its_manifest_is_refused_and_whole_again_with_it(
    net: rf.ResidualNetwork, images: torch.Tensor, labels: torch.Tensor, tmp_path: Path
) -> None:
    def evaluate() -> rf.Study:
        return rf.evaluate(net, sweeps.single(net), (images, labels), out=tmp_path / "a", progress=False)

    table = evaluate().frame
    (tmp_path / "a" / "manifest.json").rename(tmp_path / "a" / "manifest.bak")
    with pytest.raises(StudyError, match="other files"):
        evaluate()
    (tmp_path / "a" / "manifest.bak").rename(tmp_path / "a" / "manifest.json")
    assert rf.open_study(tmp_path / "a").frame.equals(table)
    # What a process leaves that was killed between sweep and manifest is taken up.
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "sweep.parquet").rename(tmp_path / "b" / "sweep.parquet")
    study = rf.evaluate(net, sweeps.single(net), (images, labels), out=tmp_path / "b", progress=False)
    assert study.frame.equals(table)


@pytest.mark.parametrize("gradients", [False, True], ids=["tallies", "norms"])
def test_a_flipped_bit_is_noticed(
    gradients: bool, net: rf.ResidualNetwork, images: torch.Tensor, labels: torch.Tensor, tmp_path: Path
) -> None:
    data = (images, labels)
    if gradients:
        study = rf.path_gradients(net, data, lengths=[1, 2], samples=3, out=tmp_path / "a", progress=False)
    else:
        study = rf.evaluate(net, sweeps.single(net), data, out=tmp_path / "a", progress=False)
    part = min((tmp_path / "a" / "parts").iterdir())
    whole, noticed = part.read_bytes(), 0
    for at in range(0, len(whole), 7):
        part.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            assert rf.open_study(tmp_path / "a").frame.equals(study.frame), at
        except StudyError:
            noticed += 1
    assert noticed > 50


def test_a_plot_goes_into_a_folder_that_is_not_there_yet(
    net: rf.ResidualNetwork, images: torch.Tensor, labels: torch.Tensor, tmp_path: Path
) -> None:
    data = (images, labels)
    for name, study in (
        ("deletions", rf.evaluate(net, sweeps.single(net), data, progress=False)),
        ("gradients", rf.path_gradients(net, data, lengths=[1, 2], samples=2, progress=False)),
    ):
        study.plot(tmp_path / "new" / f"{name}.png")
        assert (tmp_path / "new" / f"{name}.png").stat().st_size > 1000
