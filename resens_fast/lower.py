"""lower(): fold a wrapped network into plain convolutions for the fused engines, or say which block does not fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resens_fast.blocks import Block
from resens_fast.errors import NotCovered, first_line
from resens_fast.fused import Conv, FusedBlock, FusedNetwork, Head, Shortcut, Stem, convert
from resens_fast.network import ResidualNetwork
from resens_fast.piece import Piece, attribute

__all__ = ["Conv", "FusedBlock", "FusedNetwork", "Head", "Shortcut", "Stem", "lower"]

TOLERANCE = 1e-9  # of the largest value, in float64: folding only moves roundings
Steps = list[tuple[str, fx.Node]]


class _NoFit(Exception):
    """Why a part of the network is not one of the fused forms."""


def lower(net: ResidualNetwork) -> FusedNetwork:
    """The network as folded float32 parameters on the CPU, for the fused engines; computed in float64, rounded once.

    Every folded part is compared with the network's own on a random state before it is returned. Raises NotCovered that
    names the block and the reason: squeeze-excite, groups, highway gates, activations other than ReLU, and so on.
    """
    for name, module in net.model.named_modules():
        if "forward" in vars(module):
            raise NotCovered(f"module {name or 'model'!r} has a forward of its own instead of its class's")
    try:
        twin = copy.deepcopy(net).cpu().double().eval().requires_grad_(False)
        return _lower(net, twin)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # weights that are no parameters, such as pruned ones, are not copied or converted
        raise NotCovered(f"a copy of the network in float64 does not run: {first_line(error)}") from None


def _lower(net: ResidualNetwork, twin: ResidualNetwork) -> FusedNetwork:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = torch.randn(2, *net.input_shape, dtype=torch.float64, device="cpu")
        stem = _part("the stem", lambda: _stem(twin.recipe.stem, twin.model))
        state = _same("the stem", stem(image), twin.stem(image))
        blocks = []
        for block in twin.blocks:
            name = f"block {block.index} ({block.name})"
            fused = _part(name, lambda b=block: _block(b))  # type: ignore[misc]
            blocks.append(fused)
            _same(name, fused(state, 0.0), block.skip(state))
            state = _same(name, fused(state), block.run(state))
        head = _part("the head", lambda: _head(twin, state))
        _same("the head", head(state), twin.head(state))
    whole = FusedNetwork(stem, tuple(blocks), head, net.input_shape, net.structure.classes)
    return convert(whole, torch.float32)


def fold(block: Block) -> FusedBlock:
    """One block of a network in eval mode, folded in its own type, differentiable in the parameters behind it.

    Only for blocks of a network that `lower` accepts: nothing is compared here. Raises NotCovered where it sees that
    the block has changed since.
    """
    fused: FusedBlock = _part(f"block {block.index} ({block.name})", lambda: _block(block))
    return fused


def _part(name: str, build: Any) -> Any:
    try:
        return build()
    except _NoFit as reason:
        raise NotCovered(f"{name} has no fused form: {reason}") from None


def _same(name: str, found: Tensor, expected: Tensor) -> Tensor:
    limit = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not expected.isfinite().all():
        raise NotCovered(f"{name} gives numbers that are not finite on a random image; are its weights broken?")
    if found.shape != expected.shape or not float((found - expected).abs().max()) <= limit:
        raise NotCovered(f"{name} has no fused form: folded, it differs from the network's own on a random image")
    return expected


def _steps(piece: Piece) -> Steps:
    """(role, node) along a piece that is one chain; what does nothing in eval mode is left out."""
    if piece.chain() is None:
        raise _NoFit("its operations are no simple chain (squeeze-excite and attention are not covered)")
    return [(role, node) for node in piece.path() for role in piece.roles[node] if role != "drop"]


def _stem(piece: Piece, model: nn.Module) -> Stem:
    steps = _steps(piece)
    maxpool = None
    if steps and steps[-1][0] == "maxpool":
        maxpool = _max_pool(steps.pop()[1], model)
    convs = _convs(steps, model)
    if not convs:
        raise _NoFit("it has no convolution")
    return Stem(convs, maxpool)


def _block(block: Block) -> FusedBlock:
    recipe, model = block.recipe, block.model
    if recipe.kind in ("highway", "plain"):
        raise _NoFit(f"{recipe.kind} blocks are not covered")
    before, inner, closing = _steps(recipe.prologue), _steps(recipe.branch), _steps(recipe.closing)
    ends = [role for role, _ in closing]
    if ends not in ([], ["relu"]):
        raise _NoFit(f"it closes with {' '.join(ends)}, only a ReLU or nothing is covered")
    roles = [role for role, _ in before]
    if roles not in ([], ["relu"], ["norm", "relu"]):
        raise _NoFit(f"branch and shortcut share {' '.join(roles)}, only norm and ReLU are covered")
    scale = shift = None
    steps = before + inner
    if steps and steps[0][0] in ("norm", "relu"):
        channels = recipe.shape_in[0]
        like = next(model.parameters())
        scale, shift = like.new_ones(channels), like.new_zeros(channels)
        if steps[0][0] == "norm":
            scale, shift = _affine(steps.pop(0)[1], model)
        if not steps or steps.pop(0)[0] != "relu":
            raise _NoFit("its first norm is not followed by a ReLU")
    convs = _convs(steps, model)
    if len(convs) not in (2, 3):
        raise _NoFit(f"its branch has {len(convs)} convolutions, only two or three are covered")
    if [conv.relu for conv in convs] != [True] * (len(convs) - 1) + [False]:
        raise _NoFit("its branch does not have a ReLU after every convolution but the last")
    if not block.deletable:
        raise _NoFit("what goes around its branch has another shape than its output")
    shortcut = _shortcut(block, bool(before))
    return FusedBlock(
        block.index, block.name, scale, shift, convs, shortcut, bool(ends), block.shape_in, block.shape_out
    )


def _shortcut(block: Block, activated: bool) -> Shortcut:
    piece = block.recipe.shortcut
    if all(node.meta.get("nothing") for node in piece.nodes):
        if activated:
            raise _NoFit("its identity shortcut reads the activated state")
        return Shortcut("identity", 1, 0, 0, 0, None, False)
    if not piece.model_parameters:
        return _padding(block, activated)
    steps = _steps(piece)
    pool = 0
    if steps and steps[0][0] == "avgpool":
        pool = block.shape_in[1] // steps[0][1].meta["shape"][2]  # that it is this pool is checked by value
        steps = steps[1:]
    convs = _convs(steps, block.model)
    if len(convs) != 1 or convs[0].relu:
        raise _NoFit("its shortcut is more than one convolution")
    return Shortcut("projection", convs[0].stride, 0, 0, pool, convs[0], activated)


def _padding(block: Block, activated: bool) -> Shortcut:
    """A shortcut without parameters, recognised from what it does to random numbers."""
    (c, h, w), (out, height, _) = block.shape_in, block.shape_out
    stride = max(1, round(h / height))
    x = torch.randn(2, c, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(0), device="cpu")
    y = block.shortcut(x)
    filled = y.abs().amax((0, 2, 3)).nonzero()
    before = int(filled[0]) if len(filled) else 0
    for pool in (0, stride):
        found = Shortcut("pad", 1 if pool else stride, before, out - c - before, pool, None, activated)
        if found.after >= 0 and h >= stride and (s := found(x)).shape == y.shape and torch.allclose(s, y, atol=1e-12):
            return found
    raise _NoFit(f"its shortcut from {block.shape_in} to {block.shape_out} is neither padding nor a projection")


def _head(net: ResidualNetwork, state: Tensor) -> Head:
    piece, model = net.recipe.head, net.model
    path = piece.path()
    if piece.chain() is None:
        raise _NoFit("its operations are no simple chain")
    steps = [(role, node) for node in path for role in piece.roles[node] if role != "drop"]
    scale = shift = None
    relu = False
    if steps[0][0] == "norm":
        scale, shift = _affine(steps.pop(0)[1], model)
    if steps[0][0] == "relu":
        relu = bool(steps.pop(0))
    linear = [node for role, node in steps if role in ("linear", "conv")]
    if len(linear) != 1 or any(role in ("norm", "act", "relu") for role, _ in steps):
        raise _NoFit(
            f"it is {' '.join(role for role, _ in steps)} instead of global average pooling and a linear layer"
        )
    weight, bias = _weights(linear[0], model)
    if weight[0, 0].numel() != 1:
        raise _NoFit("it ends in a convolution wider than one pixel")
    weight = weight.flatten(1)  # a 1x1 convolution of the mean is a linear layer
    # That everything else is the mean over pixels is checked by value, together with the whole head.
    return Head(scale, shift, relu, weight, bias)


def _convs(steps: Steps, model: nn.Module) -> tuple[Conv, ...]:
    """Convolutions with the norms behind them folded in and the ReLUs noted."""
    convs: list[Conv] = []
    rest = iter(steps)
    step = next(rest, None)
    while step is not None:
        if step[0] != "conv":
            raise _NoFit(f"{step[0]} at {step[1].name} stands where a convolution is expected")
        weight, bias, stride, padding = _conv(step[1], model)
        step = next(rest, None)
        if step is not None and step[0] == "norm":
            scale, shift = _affine(step[1], model)
            weight, bias = weight * scale.reshape(-1, 1, 1, 1), bias * scale + shift
            step = next(rest, None)
        relu = step is not None and step[0] == "relu"
        if relu:
            step = next(rest, None)
        convs.append(Conv(weight, bias, stride, padding, relu))
    return tuple(convs)


def _conv(node: fx.Node, model: nn.Module) -> tuple[Tensor, Tensor, int, int]:
    """(weight, bias, stride, padding) of a square convolution."""
    weight, bias = _weights(node, model)
    if node.op == "call_module":
        m = model.get_submodule(str(node.target))
        assert isinstance(m, nn.modules.conv._ConvNd)
        options: tuple[Any, ...] = (m.stride, m.padding, m.dilation, m.groups)
        if m.padding_mode != "zeros":
            raise _NoFit(f"convolution {node.name} pads with {m.padding_mode}, only zeros are covered")
    else:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        values = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **_arguments(node, names)}
        options = tuple(values[k] for k in names[3:])
    stride, padding, dilation, groups = options
    kernel = weight.shape[2:]
    if padding == "valid":
        padding = 0
    if padding == "same":
        padding = [k // 2 if k % 2 else -1 for k in kernel]
    numbers = [_square(v) for v in (stride, padding, dilation, kernel)]
    if len(kernel) != 2 or None in numbers or -1 in numbers:
        raise _NoFit(f"convolution {node.name} is not square")
    if groups != 1 or numbers[2] != 1:
        raise _NoFit(f"convolution {node.name} has {groups} groups and dilation {numbers[2]}, only 1 is covered")
    return weight, bias, int(numbers[0] or 0), int(numbers[1] or 0)


def _weights(node: fx.Node, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias (zeros when there is none) of a convolution or linear layer, as module or function."""
    if node.op == "call_module":
        module: Any = model.get_submodule(str(node.target))
        weight, bias = module.weight, module.bias
    else:
        values = _arguments(node, ("input", "weight", "bias"))
        weight, bias = (_value(values.get(k), model) for k in ("weight", "bias"))
    if not isinstance(weight, Tensor):
        raise _NoFit(f"the weight of {node.name} is computed by the network itself")
    return weight, weight.new_zeros(weight.shape[0]) if bias is None else bias


def _affine(node: fx.Node, model: nn.Module) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a batch norm in eval mode."""
    if node.op == "call_module":
        m: Any = model.get_submodule(str(node.target))
        if not isinstance(m, _BatchNorm):
            raise _NoFit(f"{node.name} is a {type(m).__name__}, only batch norm can be folded")
        mean, var, weight, bias, eps = m.running_mean, m.running_var, m.weight, m.bias, m.eps
    else:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        values = _arguments(node, names)
        if getattr(node.target, "__name__", "") != "batch_norm" or values.get("training"):
            raise _NoFit(f"{node.name} is not a batch norm in eval mode")
        mean, var, weight, bias = (_value(values.get(k), model) for k in names[1:5])
        eps = values.get("eps", 1e-5)
    if mean is None or var is None:
        raise _NoFit(f"batch norm {node.name} keeps no running statistics")
    scale = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
    shift = -mean * scale if bias is None else bias - mean * scale
    return scale, shift


def _max_pool(node: fx.Node, model: nn.Module) -> tuple[int, int, int]:
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        values = {name: getattr(module, name) for name in names[1:]}
    else:
        values = {"padding": 0, "dilation": 1, **_arguments(node, names)}
    kernel, padding, dilation = (_square(values[k]) for k in ("kernel_size", "padding", "dilation"))
    stride = _square(values.get("stride") or values["kernel_size"])
    if kernel is None or padding is None or stride is None or dilation != 1:
        raise _NoFit("its max pool is not square")
    source, shape = node.all_input_nodes[0].meta["shape"], node.meta["shape"]
    plain = F.max_pool2d(torch.zeros(1, 1, *source[2:], device="cpu"), kernel, stride, padding).shape[2:]
    if tuple(plain) != tuple(shape[2:]):
        raise _NoFit("its max pool rounds the image size up")
    return kernel, stride, padding


def _arguments(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _value(argument: Any, model: nn.Module) -> Any:
    """The tensor behind a graph's argument: a parameter or buffer of the model, else itself."""
    if isinstance(argument, fx.Node) and argument.op == "get_attr":
        return attribute(model, str(argument.target))
    return argument


def _square(value: Any) -> int | None:
    """The one number that an int or a tuple of equal ints stands for."""
    numbers: Iterator[Any] = iter(value) if isinstance(value, (tuple, list, torch.Size)) else iter([value])
    found = set(numbers)
    only = found.pop() if len(found) == 1 else None
    return only if isinstance(only, int) else None
