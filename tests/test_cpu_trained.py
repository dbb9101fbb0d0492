"""The CPU engine's promises on trained networks: errors of the logits and of the predicted classes against float64."""

from __future__ import annotations

import functools

import pytest
import torch

import resens_fast as rf
from resens_fast import data, extension
from resens_fast.engines import cpu

if extension.module() is None:
    pytest.skip(f"no compiled extension: {extension.reason()}", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16)


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def pictures(count: int) -> torch.Tensor:
    """Smooth random images with contours: [count, 3, 32, 32], each channel of variance one."""
    g = torch.Generator().manual_seed(0)
    x = sum(
        torch.nn.functional.interpolate(torch.randn(count, 3, n, n, generator=g), 32, mode=mode)
        for n, mode in ((3, "bilinear"), (4, "nearest"), (8, "bilinear"), (32, "nearest"))
    )
    assert isinstance(x, torch.Tensor)
    return x / x.std((2, 3), keepdim=True)


@functools.lru_cache(maxsize=2)
def job(name: str) -> tuple[rf.ResidualNetwork, rf.Sweep, torch.Tensor, torch.Tensor]:
    """The network, a sweep, images and float64 logits [C, B, K]."""
    if name == "resnet20-digits":
        images = data.open("digits", card=rf.models.card(name), limit=100).tensors()[0]
        net = rf.wrap(rf.models.load(name), images[:1])
        sweep = rf.sweeps.intact(net) + rf.sweeps.single(net)
    else:
        images = pictures(12)
        net = rf.wrap(rf.models.load(name))
        sweep = rf.sweeps.delete_random(net, k=[0, 10], samples=2, seed=0) + rf.sweeps.swap_random(
            net, k=[5], samples=1, seed=0
        )
    return net, sweep, images, rf.logits(net, sweep, images, engine="reference")


@functools.lru_cache(maxsize=4)
def bound(name: str, dtype: torch.dtype) -> float:
    """Four times torch eager's own root-mean-square error, with a floor of a few roundings of the logits."""
    net, sweep, images, truth = job(name)
    eager = rf.logits(net, sweep, images, engine="torch", dtype=dtype)
    eps = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-23
    return max(4 * rms(eager - truth), 4 * eps * rms(truth))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("name", ["resnet20-digits", "resnet110-cifar10"])
def test_errors_and_flips(name: str, isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESENS_FAST_ISA", isa)
    net, sweep, images, truth = job(name)
    limit = bound(name, dtype)
    out = rf.logits(net, sweep, images, engine="cpu", dtype=dtype)
    assert rms(out - truth) <= limit
    top = truth.topk(2).values
    sure = top[..., 0] - top[..., 1] >= 2 * limit
    assert float(sure.double().mean()) > (0.5 if dtype == torch.bfloat16 else 0.99)  # else nothing would be tested
    assert torch.equal(out.argmax(2)[sure], truth.argmax(2)[sure])
