"""Transform gates of a highway network: against the formula, for every way of writing it; lesions of a trained one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resens_fast as rf
from resens_fast import highway
from resens_fast.errors import DataError, ModelError, WrapError
from resens_fast.training import Recipe, train
from tests import styles
from tests.test_cli import call, refused


def images(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 16, 16, generator=generator), torch.zeros(count, dtype=torch.int64)


@pytest.mark.parametrize("form", ["sum", "swapped", "carry", "lerp", "delta"])
@torch.no_grad()
def test_gates_are_the_sigmoids_of_the_forward(form: str) -> None:
    torch.manual_seed(0)
    model = styles.randomise(styles.Network(partial(styles.HighwayBlock, form=form)))
    x, y = images(150)  # more than one batch
    seen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, styles.HighwayBlock):
            module.gate.register_forward_hook(lambda _m, _a, out: seen.append(torch.sigmoid(out - 1).double()))
    net = rf.wrap(model, x[:1])
    seen.clear()
    model(x)
    expected = [1 - t for t in seen] if form == "carry" else list(seen)
    net.train()
    flags = [m.training for m in net.modules()]
    before = net.fingerprint()
    frame = highway.gates(net, (x, y))
    assert [m.training for m in net.modules()] == flags
    assert net.fingerprint() == before
    assert frame["block"].tolist() == list(range(6))
    assert frame["name"].tolist() == list(net.structure.names)
    assert frame["stage"].tolist() == [1, 1, 2, 2, 3, 3]
    for name, values in {
        "mean": [t.mean() for t in expected],
        "sd": [t.std(correction=0) for t in expected],
        "sd_images": [t.mean((1, 2, 3)).std(correction=0) for t in expected],
        "low": [t.min() for t in expected],
        "high": [t.max() for t in expected],
    }.items():
        np.testing.assert_allclose(frame[name], torch.stack(values).numpy(), rtol=1e-5, atol=1e-6, err_msg=name)


def test_networks_and_images_that_do_not_fit_are_refused() -> None:
    residual = rf.wrap(rf.models.resnet(8, width=4).eval(), torch.zeros(1, 3, 16, 16))
    with pytest.raises(ModelError, match="ResNet has no highway blocks.*basic_preact"):
        highway.gates(residual, images(2))
    with pytest.raises(WrapError, match="wrapped network is needed, not Highway"):
        highway.gates(rf.models.highway(8), images(2))
    net = rf.wrap(rf.models.highway(8, width=4).eval(), torch.zeros(1, 3, 16, 16))
    with pytest.raises(DataError, match="empty"):
        highway.gates(net, images(0))
    with torch.no_grad():
        net.model.blocks[1].gate.bias[0] = float("nan")
    with pytest.raises(ModelError, match=r"gate of block 1 \(blocks\.1\) is not finite"):
        highway.gates(net, images(2))


def test_a_trained_highway_network_is_lesioned_with_t_as_its_gate(tmp_path: Path) -> None:
    learn, test = rf.data.open("digits", train=True), rf.data.open("digits", limit=200)
    torch.manual_seed(0)
    model = rf.models.highway(14, width=8, in_channels=1)
    card = {"name": "h", "factory": "highway", "arguments": {"depth": 14, "width": 8, "in_channels": 1}}
    recipe = Recipe(epochs=4, batch=64, learning_rate=0.2, crop=1, flip=False, dtype="float32")
    result = train(model, learn, test, tmp_path / "net", recipe, card=card, progress=False)
    assert result.error < 0.3
    net = rf.wrap(model, torch.zeros(1, 1, 8, 8))
    frame = highway.gates(net, test)
    assert bool(frame["mean"].between(0, 0.5).all())  # biased to the skip, as they begin
    assert bool((frame["sd"] > 0).all())
    x, sweep = test[0][0][None], rf.sweeps.from_gates(net, [[1, 0, 0.5, 1, 0, 1]])
    model.eval()
    state: Tensor = F.relu(model.bn(model.conv(x)))
    for block, g in zip(model.blocks, sweep[0].gates, strict=True):
        s = state if block.shortcut is None else block.shortcut(state)
        f = F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(state))))))
        t = g * torch.sigmoid(block.gate(state))
        state = t * f + (1 - t) * s
    torch.testing.assert_close(rf.logits(net, sweep, x)[0], model.fc(state.mean((2, 3))), rtol=1e-4, atol=1e-4)
    out = ("--data", "digits", "--limit-images", 100)
    lesion = call("lesion", tmp_path / "net", *out, "--delete", "1:3", "--samples", 4, "--out", tmp_path / "study")
    assert lesion.exit_code == 0, lesion.output
    study = rf.open_study(tmp_path / "study").frame
    assert set(study["k"]) == {0, 1, 2, 3}
    shown = call("gates", tmp_path / "net", *out)
    assert shown.exit_code == 0, shown.output
    cut = rf.data.open("digits", card=rf.models.card(str(tmp_path / "net")), limit=100)
    rows = [line.split() for line in shown.stdout.splitlines() if "blocks." in line]
    np.testing.assert_allclose([float(r[3]) for r in rows], highway.gates(net, cut)["mean"], atol=6e-4)
    assert "no highway blocks" in refused("gates", "resnet20-digits", *out)


def test_a_bar_tells_the_images(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from resens_fast import jobs

    shares: list[float] = []
    monkeypatch.setattr(jobs.Bar, "advance", lambda self, count: lambda share: shares.append(share * count))
    net = rf.wrap(rf.models.highway(8, width=4).eval(), torch.zeros(1, 3, 16, 16))
    highway.gates(net, images(150))
    assert shares == [128, 22]
    highway.gates(net, images(2), progress=False)
    assert not capsys.readouterr().err
