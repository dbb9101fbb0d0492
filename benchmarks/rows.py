"""What is measured: a network, a sweep and a number of images for each row of the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

import resens_fast as rf


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    network: Callable[[], torch.nn.Module]
    sweep: Callable[[rf.ResidualNetwork], rf.Sweep]
    images: int
    sample: int = 1  # peers that run every configuration by itself run every sample-th, scaled up
    dtype: torch.dtype = torch.float32
    size: int = 32
    goal: tuple[float, float] = (0.0, 0.0)  # times eager, times compile
    quick: bool = False


def trained() -> torch.nn.Module:
    return rf.models.load("resnet110-cifar10")


def random(*arguments: object, **options: object) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return rf.models.resnet(*arguments, **options).eval()  # type: ignore[arg-type]

    return make


def resnet50() -> torch.nn.Module:
    from torchvision.models import resnet50 as make

    torch.manual_seed(0)
    return make(weights=None).eval()


post = random(110, preactivation=False, option="pad")
delete10 = lambda net: rf.sweeps.delete_random(net, k=[10], samples=1000, seed=0)  # noqa: E731
delete5 = lambda net: rf.sweeps.delete_random(net, k=[5], samples=1000, seed=0)  # noqa: E731
swap5 = lambda net: rf.sweeps.swap_random(net, k=[5], samples=1000, seed=0)  # noqa: E731

ROWS = [
    Row("110 pre, intact", trained, rf.sweeps.intact, 128, goal=(4.5, 3.2), quick=True),
    Row("110 post, intact", post, rf.sweeps.intact, 128, goal=(4.5, 3.2), quick=True),
    Row("110 pre, intact, bf16", trained, rf.sweeps.intact, 128, dtype=torch.bfloat16, goal=(4, 2.8)),
    Row("110 post, intact, bf16", post, rf.sweeps.intact, 128, dtype=torch.bfloat16, goal=(4, 2.8)),
    Row("110 pre, single deletions", trained, rf.sweeps.single, 64, 9, goal=(8, 6)),
    Row("110 post, single deletions", post, rf.sweeps.single, 64, 9, goal=(8, 6)),
    Row("110 pre, all pairs", trained, rf.sweeps.pairs, 32, 100, goal=(12, 8)),
    Row("110 post, all pairs", post, rf.sweeps.pairs, 32, 100, goal=(12, 8)),
    Row("110 pre, 1000 x delete 10", trained, delete10, 32, 100, goal=(5.5, 4)),
    Row("110 post, 1000 x delete 10", post, delete10, 32, 100, goal=(5.5, 4)),
    Row("110 pre, 1000 x swap 5", trained, swap5, 32, 100, goal=(5, 3.8)),
    Row("110 post, 1000 x swap 5", post, swap5, 32, 100, goal=(5, 3.8)),
    Row("110 pre, 4 images x 1000 x delete 5", trained, delete5, 4, 50, goal=(8, 5)),
    Row("110 post, 4 images x 1000 x delete 5", post, delete5, 4, 50, goal=(8, 5)),
    Row("20 pre, single deletions", random(20), rf.sweeps.single, 64, quick=True),
    Row("56 post, single deletions", random(56, preactivation=False), rf.sweeps.single, 64, 3),
    Row("164 pre bottleneck, intact", random(164, bottleneck=True), rf.sweeps.intact, 64),
    Row("56 pre, width 20, intact", random(56, width=20), rf.sweeps.intact, 64, quick=True),
    Row("resnet50, 224 x 224, single deletions", resnet50, rf.sweeps.single, 8, 4, size=224, goal=(3, 2)),
]
