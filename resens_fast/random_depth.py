"""Training in which every batch runs a random part of the blocks, and what becomes of such a network at test time.

    forward = rf.training.sample_blocks(23)         # Veit et al. 2016, section 6: 23 of 54 blocks per batch
    forward = rf.training.stochastic_depth(0.5)     # Huang et al. 2016
    logits = forward(net, images)                   # in place of net(images), in training and in eval mode
    net = forward.plain(net)                        # at the end: the network to save

A block that ran with probability p counts p at test time, so that the sum of the branches is the one the network was
trained with on average.  `plain` writes the p into the last operation of every branch: what is saved is then a plain
network, right wherever it is loaded, lesioned or reordered, on every engine, and nobody has to remember its gates.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .blocks import Block
from .errors import ModelError

if TYPE_CHECKING:
    from .network import ResidualNetwork


class RandomDepth:
    """A forward that draws a mask per batch in training mode and in eval mode gates every block with its survival.

    Draws come from PyTorch's global generator on the CPU, as dropout's do: torch.manual_seed repeats them.  Made by
    `sample_blocks` and `stochastic_depth`; `about` is what a card says of it.
    """

    about: dict[str, Any]

    def survival(self, blocks: int) -> Tensor:
        """The probability of each of `blocks` blocks to run, float64 [n]; raises ModelError for too few blocks."""
        raise NotImplementedError

    def draw(self, blocks: int) -> Tensor:
        """A mask for one batch, bool [n]."""
        raise NotImplementedError

    def __call__(self, net: nn.Module, images: Tensor) -> Tensor:
        """Logits [B, classes]; raises ModelError for a network that is not wrapped or has a block without shortcut."""
        residual = _residual(net)
        n = len(residual.blocks)
        return residual(images, mask=self.draw(n) if residual.training else self.survival(n))

    def plain(self, net: nn.Module) -> ResidualNetwork:
        """A copy of `net` that at test time computes what `net` does under the survival gates, as a plain network.

        Its branches end in weights that were multiplied by their block's survival.  Raises ModelError for a branch
        that does not end in a convolution or batch norm of its own, such as a highway block's.
        """
        residual = _residual(net)
        survival = self.survival(len(residual.blocks))
        twin = copy.deepcopy(residual)
        with torch.no_grad():
            for block, share in zip(twin.blocks, survival.tolist(), strict=True):
                for tensor in _last(block):
                    tensor.mul_(share)
        return twin


class SampleBlocks(RandomDepth):
    def __init__(self, k: int) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ModelError(f"the number of blocks to sample must be a whole number of 1 or more, not {k!r}")
        self.k = k
        self.about = {"sample_blocks": k}

    def survival(self, blocks: int) -> Tensor:
        if self.k > blocks:
            raise ModelError(f"cannot sample {self.k} blocks of a network that has {blocks}: choose {blocks} or fewer")
        return torch.full((blocks,), self.k / blocks, dtype=torch.float64, device="cpu")

    def draw(self, blocks: int) -> Tensor:
        self.survival(blocks)
        mask = torch.zeros(blocks, dtype=torch.bool, device="cpu")
        mask[torch.randperm(blocks)[: self.k]] = True
        return mask


class StochasticDepth(RandomDepth):
    def __init__(self, p_last: float) -> None:
        number = isinstance(p_last, (int, float)) and not isinstance(p_last, bool)
        if not number or math.isnan(p_last) or not 0 <= p_last <= 1:
            raise ModelError(f"the survival probability of the last block must be between 0 and 1, not {p_last!r}")
        self.p_last = float(p_last)
        self.about = {"stochastic_depth": self.p_last}

    def survival(self, blocks: int) -> Tensor:
        place = torch.arange(1, blocks + 1, dtype=torch.float64, device="cpu")
        return 1 - place / blocks * (1 - self.p_last)

    def draw(self, blocks: int) -> Tensor:
        return torch.rand(blocks, dtype=torch.float64, device="cpu") < self.survival(blocks)


def sample_blocks(k: int) -> RandomDepth:
    """Every batch runs k of the n blocks, drawn without replacement (Veit et al. 2016: 23 of 54); k / n at test time.

    Raises ModelError for a k below 1, and when it is used for a network with fewer than k blocks.
    """
    return SampleBlocks(k)


def stochastic_depth(p_last: float) -> RandomDepth:
    """Block l of L runs with probability 1 - l / L (1 - p_last), each for itself (Huang et al. 2016, linear decay).

    Raises ModelError for a p_last outside [0, 1].
    """
    return StochasticDepth(p_last)


def _residual(net: nn.Module) -> ResidualNetwork:
    from .network import ResidualNetwork

    if not isinstance(net, ResidualNetwork):
        raise ModelError(
            f"blocks are drawn in a wrapped network, not in a {type(net).__name__}: call resens_fast.wrap(model) first"
        )
    for block in net.blocks:
        if not (block.gateable and block.deletable):
            raise ModelError(
                f"block {block.index} ({block.name}) has no shortcut beside its branch, so that no batch can go "
                "without it: train a residual network"
            )
    return net


def _last(block: Block) -> list[Tensor]:
    """Weight and bias of the convolution or batch norm that a branch ends in, if they serve nothing else."""
    node = block.recipe.branch.out
    while node.meta.get("nothing") and len(node.all_input_nodes) == 1:  # dropout
        node = node.all_input_nodes[0]
    name = str(node.target)
    module = block.model.get_submodule(name) if node.op == "call_module" else None
    # A weight that is computed from others (weight norm) is no parameter.
    if not isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) or not isinstance(module.weight, nn.Parameter):
        raise ModelError(
            f"the branch of block {block.index} ({block.name}) does not end in a convolution or batch norm whose "
            "weights could take up its survival probability: train with another kind of block"
        )
    uses = sum(f"{other.target}.".startswith(f"{name}.") for other in node.graph.nodes if other.op != "placeholder")
    owners = sum(p is module.weight for _, p in block.model.named_parameters(remove_duplicate=False))
    if uses > 1 or owners > 1:
        raise ModelError(
            f"{name}, in which the branch of block {block.index} ({block.name}) ends, is used more than once, so that "
            "its weights cannot take up a survival probability: give every block weights of its own"
        )
    return [tensor for tensor in (module.weight, module.bias) if tensor is not None]
