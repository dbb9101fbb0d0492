"""Studies: written whole, resumed without repeating, refused when anything differs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest
from torch.utils.data import DataLoader, TensorDataset

import resens_fast as rf
from resens_fast import engines, sweeps
from resens_fast import evaluate as _  # noqa: F401
from resens_fast.errors import DataError, StudyError
from resens_fast.study import wilson_interval
from tests.conftest import small_resnet

evaluation = sys.modules["resens_fast.evaluate"]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one batch of 8 images, so that 40 images make five; on the engine whose batch can be chosen."""
    others = {name: kind for name, kind in engines._REGISTRY.items() if name != "cpu"}
    monkeypatch.setattr(engines, "_REGISTRY", others)  # not delitem: that puts it back at the end
    monkeypatch.setattr(evaluation, "_PART_IMAGES", 8)
    monkeypatch.setattr("resens_fast.engines.torch._BATCH", {"cpu": 8})


class Interrupting(TensorDataset):
    """Presses Ctrl-C while image ``at`` is read."""

    at = 10**9

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        if index == self.at:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def loader(dataset: TensorDataset) -> DataLoader:  # type: ignore[type-arg]
    return DataLoader(dataset, batch_size=8)


def make(net: rf.ResidualNetwork) -> rf.Sweep:
    return sweeps.intact(net) + sweeps.delete_random(net, k=[1, 2], samples=3)


def same(a: pd.DataFrame, b: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(a, b)


def files(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in sorted((folder / "parts").iterdir())}


def test_round_trip(net: rf.ResidualNetwork, images: torch.Tensor, labels: torch.Tensor, tmp_path: Path) -> None:
    sweep = make(net) + sweeps.from_gates(net, np.full((1, 6), 0.25))
    study = rf.evaluate(net, sweep, (images, labels), out=tmp_path / "a", progress=False)
    in_memory = rf.evaluate(net, sweep, (images, labels), progress=False)
    opened = rf.open_study(tmp_path / "a")
    same(study.frame, opened.frame)
    same(study.frame, in_memory.frame)
    assert opened.structure == net.structure
    assert opened.complete
    assert opened.images == 40
    assert opened.sweep.digest == sweep.digest
    assert (in_memory.path, opened.path) == (None, tmp_path / "a")
    assert len(files(tmp_path / "a")) == 5
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert (manifest["engine"]["name"], manifest["network"]["fingerprint"]) == ("torch", net.fingerprint())
    assert not list(tmp_path.rglob("*.unfinished"))


def test_how_the_data_come_does_not_matter(
    net: rf.ResidualNetwork, images: torch.Tensor, labels: torch.Tensor, tmp_path: Path
) -> None:
    dataset = TensorDataset(images, labels)
    expected = rf.evaluate(net, make(net), (images, labels), progress=False).frame
    for data in (
        dataset,
        DataLoader(dataset, batch_size=7),
        DataLoader(dataset, batch_size=64),
        (images.numpy(), labels.numpy()),
        (images.contiguous(memory_format=torch.channels_last), labels.int()),
        (images.expand(40, -1, -1, -1), labels.tolist()),
    ):
        frame = rf.evaluate(net, make(net), data, progress=False).frame
        same(frame.drop(columns="loss"), expected.drop(columns="loss"))
        np.testing.assert_allclose(frame["loss"], expected["loss"], atol=1e-5)


def test_ctrl_c_keeps_what_is_finished(
    net: rf.ResidualNetwork, images: torch.Tensor, labels: torch.Tensor, tmp_path: Path
) -> None:
    dataset = Interrupting(images, labels)
    dataset.at = 29
    with pytest.raises(KeyboardInterrupt):
        rf.evaluate(net, make(net), loader(dataset), out=tmp_path / "a", progress=False)
    stopped = rf.open_study(tmp_path / "a")
    assert not stopped.complete
    assert stopped.images == 24
    with pytest.warns(UserWarning, match="incomplete: 24 of 40 images"):
        assert (stopped.frame["images"] == 24).all()
    before = files(tmp_path / "a")
    dataset.at = 10**9
    study = rf.evaluate(net, make(net), loader(dataset), out=tmp_path / "a", progress=False)
    after = files(tmp_path / "a")
    assert study.complete
    assert {k: after[k] for k in before} == before
    assert len(after) == 5
    once = rf.evaluate(net, make(net), (images, labels), progress=False)
    same(study.frame, once.frame)
    assert study.manifest["data"] == once.manifest["data"]  # the hash too, however the images were divided
    rf.evaluate(net, make(net), loader(dataset), out=tmp_path / "a", progress=False)
    assert files(tmp_path / "a") == after


def test_an_interrupted_part_keeps_its_finished_batches(
    net: rf.ResidualNetwork, images: torch.Tensor, labels: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "_PART_IMAGES", 1000)
    dataset = Interrupting(images, labels)
    dataset.at = 20
    with pytest.raises(KeyboardInterrupt):
        rf.evaluate(net, make(net), loader(dataset), out=tmp_path / "a", progress=False)
    assert rf.open_study(tmp_path / "a").images == 16


_KILLED = """
import sys, time, torch, resens_fast as rf
from tests.conftest import small_resnet
import resens_fast.engines.torch as engine
sys.modules["resens_fast.evaluate"]._PART_IMAGES = 8
engine._BATCH = {"cpu": 8}
class Slow(torch.utils.data.TensorDataset):
    def __getitem__(self, i):
        time.sleep(0.01)
        return super().__getitem__(i)
images, labels = torch.load(sys.argv[1])
net = rf.wrap(small_resnet(), torch.zeros(1, 3, 16, 16))
data = torch.utils.data.DataLoader(Slow(images, labels), batch_size=8)
sweep = rf.sweeps.intact(net) + rf.sweeps.delete_random(net, k=[1, 2], samples=3)
rf.evaluate(net, sweep, data, engine="torch", out=sys.argv[2], progress=False)
"""


def test_kill_dash_nine(images: torch.Tensor, labels: torch.Tensor, tmp_path: Path) -> None:
    torch.save((images.repeat(20, 1, 1, 1), labels.repeat(20)), tmp_path / "data.pt")
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "data.pt"), str(tmp_path / "a")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "a" / "parts").glob("*.parquet"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = rf.open_study(tmp_path / "a")
    assert not stopped.complete
    assert 24 <= stopped.images < 800
    before = files(tmp_path / "a")
    subprocess.run(command, env=environment, check=True)
    finished = rf.open_study(tmp_path / "a")
    after = files(tmp_path / "a")
    assert finished.complete
    assert finished.images == 800
    assert {k: after[k] for k in before} == before
    net = rf.wrap(small_resnet(), torch.zeros(1, 3, 16, 16))
    whole = rf.evaluate(net, make(net), torch.load(tmp_path / "data.pt"), progress=False)
    same(finished.frame, whole.frame)


@pytest.fixture
def half(net: rf.ResidualNetwork, images: torch.Tensor, labels: torch.Tensor, tmp_path: Path) -> Path:
    dataset = Interrupting(images, labels)
    dataset.at = 29
    with pytest.raises(KeyboardInterrupt):
        rf.evaluate(net, make(net), loader(dataset), out=tmp_path / "half", progress=False)
    return tmp_path / "half"


def test_resume_is_refused_when_anything_differs(
    net: rf.ResidualNetwork, images: torch.Tensor, labels: torch.Tensor, half: Path
) -> None:
    before = files(half)

    def again(
        network: rf.ResidualNetwork = net, sweep: rf.Sweep | None = None, data: object = None, **kwargs: object
    ) -> None:
        rf.evaluate(network, sweep or make(network), data or (images, labels), out=half, progress=False, **kwargs)  # type: ignore[arg-type]

    other = rf.wrap(small_resnet(seed=5, preactivation="preact" in net.blocks[0].kind), torch.zeros(1, 3, 16, 16))
    with pytest.raises(StudyError, match="another network"):
        again(other)
    with pytest.raises(StudyError, match="another sweep"):
        again(sweep=sweeps.single(net))
    with pytest.raises(StudyError, match="another engine"):
        again(engine="reference")
    with pytest.raises(StudyError, match="another dtype"):
        again(dtype=torch.float64)
    with pytest.raises(StudyError, match="study of 40 images, these data have 39"):
        again(data=(images[:39], labels[:39]))
    with pytest.raises(StudyError, match="loader that shuffles"):
        again(data=DataLoader(TensorDataset(images, labels), shuffle=True))
    with pytest.raises(StudyError, match="images 0 to 7 are not those"):
        again(data=(images.flip(0), labels.flip(0)))
    with pytest.raises(StudyError, match="images 16 to 23 are not those"):
        again(data=(torch.cat([images[:20], images[20:] + 1e-3]), labels))
    with pytest.raises(StudyError, match="images 8 to 15 are not those"):
        again(data=(images, torch.cat([labels[:9], (labels[9:] + 1) % 5])))
    assert files(half) == before


def test_damaged_studies(half: Path, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        copy = tmp_path / name
        shutil.copytree(half, copy)
        return copy

    folder = broken("part")
    part = sorted((folder / "parts").iterdir())[1]
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(StudyError, match="000000008-000000016.parquet is damaged"):
        rf.open_study(folder)
    part.unlink()
    with pytest.raises(StudyError, match="no part for the images from 8 on"):
        rf.open_study(folder)
    folder = broken("manifest")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(StudyError, match="manifest.json is damaged"):
        rf.open_study(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(StudyError, match="holds no study"):
        rf.open_study(folder)
    manifest = json.loads((half / "manifest.json").read_text())
    for name, value in {"sweep": {}, "data": 5, "engine": {"name": "torch"}, "network": [], "seconds": "long"}.items():
        folder = broken(f"manifest-{name}")
        (folder / "manifest.json").write_text(json.dumps({**manifest, name: value}))
        with pytest.raises(StudyError, match="manifest.json is damaged"):
            rf.open_study(folder)
    folder = broken("sweep")
    (folder / "sweep.parquet").unlink()
    with pytest.raises(StudyError, match="sweep.parquet is damaged or missing"):
        rf.open_study(folder)
    with pytest.raises(StudyError, match="holds no study"):
        rf.open_study(tmp_path / "nowhere")


def test_a_finished_study_that_lost_its_last_part_is_finished_again(
    net: rf.ResidualNetwork, images: torch.Tensor, labels: torch.Tensor, tmp_path: Path
) -> None:
    whole = rf.evaluate(net, make(net), (images, labels), engine="torch", out=tmp_path, progress=False).frame
    sorted((tmp_path / "parts").iterdir())[-1].unlink()
    with pytest.warns(UserWarning, match="incomplete: 32 of 40 images"):
        assert rf.open_study(tmp_path).frame["images"][0] == 32
    again = rf.evaluate(net, make(net), (images, labels), engine="torch", out=tmp_path, progress=False)
    same(again.frame, whole)
    shutil.rmtree(tmp_path / "parts")
    assert not rf.open_study(tmp_path).complete


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_folder_name_that_cannot_be(name: str, net: rf.ResidualNetwork, images: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="cannot make the folder"):
        rf.evaluate(net, make(net), (images, torch.zeros(40, dtype=torch.int64)), out=tmp_path / name, progress=False)


def test_a_disk_full_from_the_start_leaves_no_folder(  # type: ignore[no-untyped-def]
    net, images, labels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("resens_fast.folder.StudyFolder.write_manifest", full)
    with pytest.raises(OSError, match="No space left"):
        rf.evaluate(net, make(net), (images, labels), out=tmp_path / "a", progress=False)
    assert not (tmp_path / "a").exists()


def test_two_writers(net: rf.ResidualNetwork, images: torch.Tensor, labels: torch.Tensor, tmp_path: Path) -> None:
    from resens_fast.folder import StudyFolder

    with StudyFolder(tmp_path / "a").locked(), pytest.raises(StudyError, match="another process is writing"):
        rf.evaluate(net, make(net), (images, labels), out=tmp_path / "a", progress=False)


def test_no_space_left(
    net: rf.ResidualNetwork, images: torch.Tensor, labels: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up at the fourth file; after some is freed the same call goes on."""
    real, written = os.replace, []

    def full(source: object, target: object) -> None:
        written.append(target)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StudyError, match="no space left to write .*parquet|no space left to write .*manifest"):
        rf.evaluate(net, make(net), (images, labels), out=tmp_path / "a", progress=False)
    monkeypatch.setattr(os, "replace", real)
    assert not list(tmp_path.rglob("*.unfinished"))
    study = rf.evaluate(net, make(net), (images, labels), out=tmp_path / "a", progress=False)
    same(study.frame, rf.evaluate(net, make(net), (images, labels), progress=False).frame)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (lambda x, y: (x[:, :1], y), r"\[40, 1, 16, 16\], but the network takes \[B, 3, 16, 16\]"),
        (lambda x, y: (x[0], y[:3]), r"\[3, 16, 16\]"),
        (lambda x, y: ((x * 50).byte(), y), "torch.uint8; normalise"),
        (lambda x, y: (x, y + 4), "image 0 has the label 8|has the label [5678], but the network has 5 classes"),
        (lambda x, y: (x, -y - 1), "has the label -"),
        (lambda x, y: (x, y.float()), "whole number per image"),
        (lambda x, y: (x, y[:39]), "whole number per image"),
        (lambda x, y: (x[:0], y[:0]), "data set is empty"),
        (lambda x, y: TensorDataset(x[:0], y[:0]), "data set is empty"),
        (lambda x, y: TensorDataset(x), r"must yield \(images, labels\)"),
        (lambda x, y: x, "must yield|must be a DataLoader"),
        (lambda x, y: 7, "not int"),
        (lambda x, y: None, "not NoneType"),
        (lambda x, y: (None, y), "images must be a tensor or an array of numbers, not NoneType"),
        (lambda x, y: (x, ["cat"] * 40), "labels must be a tensor or an array of numbers, not list"),
        (lambda x, y: (x.to("meta"), y), "dense tensor with values"),
        (lambda x, y: (x.to_sparse(), y), "dense tensor with values"),
        (lambda x, y: [(object(), 0)] * 9, "<class 'object'>; give it a transform"),
        (lambda x, y: [(x[0], 0), (x[1, :, 2:], 0), (x[2], 0)], "different sizes, .*; resize or crop"),
        (lambda x, y: DataLoader([(x[0], 0), (x[1, :, 2:], 0), (x[2], 0)]), "different sizes, .*; resize or crop"),
    ],
)
def test_bad_data(
    data, says, net: rf.ResidualNetwork, images: torch.Tensor, labels: torch.Tensor, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=says):
        rf.evaluate(net, make(net), data(images, labels), out=tmp_path / "a", progress=False)
    assert not (tmp_path / "a").exists()


def test_another_image_size_goes_where_the_network_takes_it(
    net: rf.ResidualNetwork, labels: torch.Tensor, tmp_path: Path
) -> None:
    large = torch.randn(40, 3, 24, 20)
    assert rf.evaluate(net, make(net), (large, labels), progress=False).images == 40
    small = torch.randn(40, 3, 0, 16)
    with pytest.raises(DataError, match=r"\[40, 3, 0, 16\]"):
        rf.evaluate(net, make(net), (small, labels), progress=False)


def test_wilson_interval_is_scipys() -> None:
    errors = np.array([0, 1, 17, 50])
    low, high = wilson_interval(errors, 50)
    for e, lo, hi in zip(errors.tolist(), low, high, strict=True):
        interval = binomtest(e, 50).proportion_ci(0.95, method="wilson")
        assert (lo, hi) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert np.isnan(wilson_interval(errors, 0)).all()


def test_progress_is_shown_on_long_work(
    net: rf.ResidualNetwork, images: torch.Tensor, labels: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    rf.evaluate(net, make(net), (images, labels), progress=True)
    assert capsys.readouterr().err == ""  # shorter than two seconds: no bar


def test_images_without_a_known_length(net: rf.ResidualNetwork, images: torch.Tensor, labels: torch.Tensor) -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self):  # type: ignore[no-untyped-def]
            yield from zip(images, labels, strict=True)

    study = rf.evaluate(net, make(net), DataLoader(Stream(), batch_size=9), progress=False)
    same(study.frame, rf.evaluate(net, make(net), (images, labels), progress=False).frame)
    with pytest.raises(DataError, match="empty"):
        rf.evaluate(net, make(net), DataLoader([], batch_size=9), progress=False)  # type: ignore[arg-type]
