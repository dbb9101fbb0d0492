"""Shared by all tests: one thread, small networks with statistics that make every block matter, random images."""

from __future__ import annotations

import pytest
import torch

import resens_fast as rf


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Eval mode with batch-norm statistics and weights that differ from their initial values, so that nothing is
    trivially equal.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(uniform(module.running_mean, -0.3, 0.3))
            module.running_var.copy_(uniform(module.running_var, 0.5, 1.5))
            with torch.no_grad():
                module.weight.copy_(uniform(module.weight, 0.5, 1.0))
                module.bias.copy_(uniform(module.bias, -0.3, 0.3))
    return model.eval()


def small_resnet(seed: int = 0, preactivation: bool = True, depth: int = 14, classes: int = 5) -> torch.nn.Module:
    """Two blocks per stage of 8, 16 and 32 channels."""
    torch.manual_seed(seed)
    return randomise(rf.models.resnet(depth, preactivation=preactivation, width=8, classes=classes), seed)


@pytest.fixture(scope="module", params=[True, False], ids=["preactivation", "postactivation"])
def net(request: pytest.FixtureRequest) -> rf.ResidualNetwork:
    return rf.wrap(small_resnet(preactivation=request.param), torch.zeros(1, 3, 16, 16))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def labels() -> torch.Tensor:
    return torch.randint(0, 5, (40,), generator=torch.Generator().manual_seed(2))
