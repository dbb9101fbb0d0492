"""What every engine is: it prepares a plan for one network, and then turns images into tallies or logits."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import EngineError, first_line

if TYPE_CHECKING:
    from ..gradient_plan import GradientPlan
    from ..network import ResidualNetwork
    from ..plan import Plan

LOSS_SCALE = 2**24
"""A loss is summed as whole multiples of 1 / LOSS_SCALE, so that the sum does not depend on the order of the images."""

LOSS_LIMIT = 2.0**16
"""Larger losses of a single image count as this much, so that a sum over 2**22 images fits into 64 bits."""

Progress = Callable[[float], None]
"""Told the share of the plan done since the last call (the shares of one call of an executor add up to 1); may raise
KeyboardInterrupt.
"""


class Tally(NamedTuple):
    """Sums over images for every unique word of a plan, each int64 [W]; loss in units of 1 / LOSS_SCALE."""

    errors: NDArray[np.int64]
    loss: NDArray[np.int64]
    nonfinite: NDArray[np.int64]

    @classmethod
    def zeros(cls, words: int) -> Tally:
        return cls(*(np.zeros(words, dtype=np.int64) for _ in range(3)))

    def add(self, other: Tally) -> None:
        for mine, theirs in zip(self, other, strict=True):
            mine += theirs

    def columns(self) -> dict[str, NDArray[Any]]:
        """For a table with a row per word or configuration."""
        return self._asdict()

    @classmethod
    def from_columns(cls, columns: dict[str, NDArray[Any]]) -> Tally:
        """What `columns` gave, among others; KeyError when one is missing."""
        return cls(*(columns[name].astype(np.int64) for name in cls._fields))

    @classmethod
    def gather(cls, words: int, counts: dict[int, torch.Tensor]) -> Tally:
        """From the `count` of each word."""
        rows = torch.stack([counts[word] for word in range(words)]).cpu().numpy()
        return cls(*(np.ascontiguousarray(column) for column in rows.T))


def count(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Errors, loss and non-finite images of one word as int64 [3], from logits [B, K] and labels int64 [B] on one
    device.

    The prediction is the lowest index of the largest logit. An image with a non-finite logit is an error, counts as
    non-finite and has no loss.
    """
    logits = logits.double()
    finite = torch.isfinite(logits).all(dim=1)
    prediction = (logits == logits.amax(dim=1, keepdim=True)).int().argmax(dim=1)
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none").clamp(max=LOSS_LIMIT)
    fixed = torch.round(torch.where(finite, loss, 0.0) * LOSS_SCALE).long()
    return torch.stack([((prediction != labels) | ~finite).sum(), fixed.sum(), (~finite).sum()])


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross-entropy [B] of float64 logits [B, K] and labels int64 [B], with all digits of its gradient.

    torch's takes 1 from the softmax of the label, and nothing is left of that where the label leads by 40.
    """
    label = labels[:, None]
    others = logits.scatter(1, label, -torch.inf).logsumexp(1)
    loss = torch.nn.functional.softplus(others - logits.gather(1, label)[:, 0], threshold=40)
    # As with torch's, NaN where a logit is NaN or infinite.
    return loss * torch.where(logits.detach().amax(1).isfinite(), 1.0, torch.nan)


def replica(
    net: ResidualNetwork, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format
) -> ResidualNetwork:
    """A copy of the network for one executor, in the layout it likes; the user's own stays as it is."""
    try:
        twin = copy.deepcopy(net)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise EngineError(
            f"the network cannot be copied ({first_line(error)}): make weights that a hook computes permanent first, "
            "such as pruned ones with torch.nn.utils.prune.remove"
        ) from None
    twin.to(device=device, dtype=dtype, memory_format=memory_format)  # type: ignore[call-overload]
    return twin.requires_grad_(False).eval()


class Executor(ABC):
    """A plan made ready on one device for one network in eval mode; ``batch`` is the number of images it likes to be
    given at once.
    """

    batch: int

    footprint: int | None = None
    """Bytes it takes for states and scratch, however many images and configurations there are; None if it depends."""

    @abstractmethod
    def tally(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None = None) -> Tally:
        """Errors, loss and non-finite counts of every word; images [B, C, H, W] and labels int64 [B] on any device."""

    @abstractmethod
    def logits(self, images: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        """Logits [W, B, K] of every word on the CPU, in the engine's own precision."""


AT = ("first_block", "image", "parameters")
"""Where a path's gradient can be taken: at the input of the first block, at the image, over the blocks' parameters."""


class GradientExecutor(ABC):
    """Paths made ready for the backward pass; ``batch`` is the number of images it likes to be given at once.

    The loss is each image's own cross-entropy, so that the other images of a batch do not matter.
    """

    batch: int

    @abstractmethod
    def norms(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        """L2 norm of every word's gradient for each image, float64 [W, B] on the CPU; at ``parameters`` float64
        [W, B, blocks], over the parameters of each block.

        images [B, C, H, W] and labels int64 [B] on any device. A gradient that is not finite has a norm that is not.
        """

    @abstractmethod
    def gradients(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        """Every word's gradient at the first block's input or the image, [W, B, C, H, W] on the CPU, in the engine's
        own precision; there is none at ``parameters``.
        """


class Engine(ABC):
    """One way to execute plans."""

    name: str
    bitwise: bool
    """Whether a configuration's result is bitwise the same alone or among thousands, for any batch and number of
    threads.
    """

    unproven: str | None = None
    """Why ``auto`` passes the engine over although it could run; a named engine runs all the same."""

    path = ""
    """Which of several ways `prepare` took, in words, where there are several."""

    fused = True
    """Whether it runs folded parameters: only at the image size the network was wrapped for, and without hooks."""

    def missing(self) -> str | None:
        """Why this machine cannot run the engine, or None."""
        return None

    def refuses(self, net: ResidualNetwork, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why the engine does not cover this network, device or dtype, naming the block; or None."""
        return None

    @abstractmethod
    def prepare(self, net: ResidualNetwork, plan: Plan, device: torch.device, dtype: torch.dtype) -> Executor:
        """Make the plan ready to run on images."""

    def refuses_gradients(
        self, net: ResidualNetwork, plan: GradientPlan, device: torch.device, dtype: torch.dtype, at: str
    ) -> str | None:
        """Why the engine cannot follow these paths backward to ``at`` (one of ``AT``), naming the block; or None."""
        return "it has no gradients"

    def prepare_gradients(
        self, net: ResidualNetwork, plan: GradientPlan, device: torch.device, dtype: torch.dtype, at: str
    ) -> GradientExecutor:
        """Make the paths ready to run on images; only after ``refuses_gradients`` said None."""
        raise NotImplementedError(f"the {self.name} engine has no gradients")
