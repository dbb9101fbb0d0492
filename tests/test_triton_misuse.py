"""The Triton engine where something is missing, damaged or asked for in vain: no GPU, no interpreter."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import resens_fast as rf
from resens_fast.errors import EngineError
from tests.conftest import small_resnet

HERE = importlib.util.find_spec("triton") is not None


def old() -> ModuleType:
    module = ModuleType("triton")
    module.__version__ = "2.1.0"  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("package", "reason"),
    [(None, "triton is not installed"), (old(), "triton cannot be used .*knobs")],
    ids=["missing", "old"],
)
def test_without_a_usable_triton(package: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other engines run, and this one says what is wrong."""
    monkeypatch.setitem(sys.modules, "triton", package)
    net = rf.wrap(small_resnet(), torch.zeros(1, 3, 8, 8))
    images, sweep = torch.randn(1, 3, 8, 8), rf.sweeps.intact(net)
    assert rf.logits(net, sweep, images).shape == (1, 1, 5)
    assert "triton" in net.summary()
    with pytest.raises(EngineError, match=reason):
        rf.logits(net, sweep, images, engine="triton")
    with pytest.raises(EngineError, match=reason):
        net(images, mask=torch.ones(len(net.blocks)), engine="triton")


def test_a_triton_that_breaks_on_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from resens_fast.engines.triton import TritonEngine

    (tmp_path / "triton.py").write_text("raise OSError('libtriton.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    assert "libtriton.so" in str(TritonEngine().missing())


@pytest.mark.skipif(not HERE, reason="the package triton is missing")
@pytest.mark.parametrize(
    "content",
    [
        b"{", b"\xff\xfe\x00", b"[1]", b'{"a": 1}', b'{"a": {"block_m": 64}}',
        b'{"a": {"block_m": "x", "block_n": 16, "warps": 4, "stages": 2}}',
        b'{"a": {"block_m": 48, "block_n": 16, "warps": 4, "stages": 2}}',
        b'{"a": {"block_m": 64, "block_n": 0, "warps": 4, "stages": 2}}',
    ],
)  # fmt: skip
def test_a_damaged_file_of_tiles_is_named(content: bytes, tmp_path: Path) -> None:
    from resens_fast.kernels import tiles

    file = tmp_path / "tiles.json"
    file.write_bytes(content)
    with pytest.raises(EngineError, match=r"tiles\.json is damaged .*delete it"):
        tiles.measured(file)


@pytest.mark.skipif(not HERE, reason="the package triton is missing")
def test_where_tiles_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from resens_fast.kernels import tiles

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card/2")
    monkeypatch.setenv("HOME", "/home/of/someone")
    for named, folder in (("~/x", "/home/of/someone/x"), ("/y", "/y"), ("", "/home/of/someone/.cache/resens_fast")):
        monkeypatch.setenv("RESENS_FAST_CACHE", named)
        file = tiles.cache_file(torch.device("cuda", 0))
        assert str(file.parent) == folder
        assert file.name.startswith("tiles-A-card-2-triton-")


@pytest.mark.skipif(not HERE or torch.cuda.is_available(), reason="the package triton is missing, or there is a GPU")
@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("tune", [], "there is no GPU"),
        ("tune", ["--depth", "7"], "depth"),
        ("check", [], "there is no GPU"),
        ("check", ["--bogus"], "unrecognized arguments: --bogus"),
        ("specialisations", ["--capability", "999"], "invalid choice: 999"),
        ("specialisations", ["--dtype"], "expected at least one argument"),
    ],
)
def test_commands_say_what_is_wrong(
    module: str, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as left:
        importlib.import_module(f"resens_fast.kernels.{module}").main()
    assert left.value.code == 2
    assert message in capsys.readouterr().err
