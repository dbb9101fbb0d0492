"""The network under a mask with its blocks in Triton kernels, differentiable in the images and all parameters.

For fine-tuning and saliency with frozen batch norms (eval mode): they fold into the convolutions, and autograd brings
the gradients of the folded parameters to those behind them. In training mode a batch norm takes its statistics from
what the convolution before it has written, so nothing can be folded; `net(x, mask=...)` without an engine serves there.
Stem and head are the network's own modules.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import lower, masks
from ..errors import EngineError
from ..fused import FusedBlock, _channels

if TYPE_CHECKING:
    from ..network import ResidualNetwork

# Which device, dtype, image size and modules have been looked at: looking folds the whole network, and a step of
# training does not change whether it can be folded.
_COVERED: weakref.WeakKeyDictionary[torch.nn.Module, set[tuple[object, ...]]] = weakref.WeakKeyDictionary()


def forward(net: ResidualNetwork, x: Tensor, mask: Tensor) -> Tensor:
    """Logits [B, classes] for images [B, C, H, W] and a mask [n] or [B, n], as `masks.forward`.

    Raises EngineError in training mode, for a mask that requires a gradient, and where the triton engine cannot run.
    """
    _check(net, x, mask)
    from ..kernels import block as kernels
    from ..kernels.pack import width

    gates = masks.check(net.structure, mask, len(x))
    if gates.ndim == 1:
        gates = gates.expand(len(x), -1)
    state = net.stem(x)
    channels = state.shape[1]
    state = torch.nn.functional.pad(state.permute(0, 2, 3, 1), (0, width(channels) - channels)).contiguous()
    for j, each in enumerate(net.blocks):
        column = gates[:, j].to(torch.float32)
        if bool((column == 0).all()) and each.drops:
            continue
        block = lower.fold(each)
        rows = column.nonzero().flatten()
        if 0 < len(rows) == len(x):
            state = kernels.run(block, state, _shared(column).to(x.device))
            continue
        result = _skipped(block, state)
        if len(rows):
            here = rows.to(x.device)
            run = kernels.run(block, state[here], _shared(column[rows]).to(x.device))
            result = result.index_copy(0, here, run)
        state = result
    channels = net.blocks[-1].shape_out[0]
    return net.head(state[..., :channels].permute(0, 3, 1, 2))


def _shared(gates: Tensor) -> Tensor:
    """One gate [1] where all images have the same, else [B]."""
    return gates[:1] if bool((gates == gates[0]).all()) else gates


def _skipped(block: FusedBlock, state: Tensor) -> Tensor:
    """A deleted block's output [B, y, x, channels], by PyTorch: there is next to nothing to compute."""
    from ..kernels.pack import width

    x = state[..., : block.shape_in[0]].permute(0, 3, 1, 2)
    if block.shortcut.activated and block.scale is not None:
        x = (_channels(block.scale) * x + _channels(block.shift)).relu()
    y = block.shortcut(x).permute(0, 2, 3, 1)
    y = torch.nn.functional.pad(y, (0, width(y.shape[3]) - y.shape[3]))
    return y.relu() if block.closing_relu else y


def _check(net: ResidualNetwork, x: Tensor, mask: Tensor) -> None:
    for name, module in net.model.named_modules():
        if module.training:
            raise EngineError(
                f"the triton engine folds batch norms, but {name or 'the model'} is in training mode; call eval() "
                "first, or leave the engine out"
            )
    if mask.requires_grad:
        raise EngineError("the triton engine has no gradient with respect to gates; leave the engine out")
    from . import choose

    key = (x.device, net.dtype, tuple(x.shape[1:]), *_modules(net))
    covered = _COVERED.setdefault(net, set())
    if key not in covered:
        choose("triton", net, x.device, net.dtype, tuple(x.shape[1:]))
        covered.add(key)


def _modules(net: ResidualNetwork) -> Iterator[object]:
    """What changes when a module is replaced, is given a forward of its own, or a hook is added for all modules."""
    for module in net.model.modules():
        yield id(module), type(module), id(vars(module).get("forward"))
    hooks = torch.nn.modules.module
    yield tuple(hooks._global_forward_hooks), tuple(hooks._global_forward_pre_hooks)
