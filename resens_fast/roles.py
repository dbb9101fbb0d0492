"""What an operation of a traced graph does: convolution, norm, activation, pooling ... told from its behaviour."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

ACTIVATIONS = (
    nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardtanh, nn.Hardswish,
    nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Threshold, nn.RReLU,
)  # fmt: skip
NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.modules.instancenorm._InstanceNorm)
DROPS = (nn.modules.dropout._DropoutNd,)
FLATTENS = (nn.Flatten, nn.Unflatten)
MAX_POOLS = (nn.modules.pooling._MaxPoolNd,)
AVG_POOLS = (nn.modules.pooling._AvgPoolNd,)
ADAPTIVE_POOLS = (nn.modules.pooling._AdaptiveAvgPoolNd,)
BY_MODULE: tuple[tuple[Any, str], ...] = (
    (_ConvTransposeNd, "other"), (_ConvNd, "conv"), (nn.ReLU6, "act"), (nn.ReLU, "relu"), (ACTIVATIONS, "act"),
    (DROPS, "drop"), (FLATTENS, "flatten"), (nn.Linear, "linear"), (MAX_POOLS, "maxpool"), (AVG_POOLS, "avgpool"),
    (ADAPTIVE_POOLS, "adaptive"),
)  # fmt: skip
BY_NAME = {
    "relu": "relu", "relu_": "relu", "conv1d": "conv", "conv2d": "conv", "conv3d": "conv",
    "batch_norm": "norm", "group_norm": "norm", "layer_norm": "norm", "instance_norm": "norm",
    "dropout": "drop", "dropout_": "drop", "dropout2d": "drop", "feature_dropout": "drop",
    "flatten": "flatten", "view": "flatten", "reshape": "flatten", "squeeze": "flatten", "linear": "linear",
    "max_pool2d": "maxpool", "boolean_dispatch": "maxpool", "avg_pool2d": "avgpool",
    "adaptive_avg_pool2d": "adaptive", "adaptive_max_pool2d": "other",
    "relu6": "act", "relu6_": "act", "leaky_relu": "act", "leaky_relu_": "act", "elu": "act", "elu_": "act",
    "selu": "act", "celu": "act", "gelu": "act", "silu": "act", "mish": "act", "hardtanh": "act", "hardswish": "act",
    "hardsigmoid": "act",
    "sigmoid": "act", "sigmoid_": "act", "tanh": "act", "tanh_": "act", "softplus": "act", "softsign": "act",
}  # fmt: skip
ADDS = {"add", "add_", "iadd"}


def roles(node: fx.Node, model: nn.Module) -> tuple[str, ...]:
    """The steps a node consists of, in order: mostly one of conv norm relu act maxpool avgpool gap drop linear."""
    if node.op == "call_module":
        return _module_roles(model.get_submodule(str(node.target)), node)
    if node.op not in ("call_function", "call_method"):
        return ()
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name in ("clamp", "clamp_", "clamp_min", "clamp_min_", "maximum", "threshold", "threshold_") and _is_relu_call(
        node, model
    ):
        return ("relu",)
    if name == "mean" and _is_global(node):
        return ("gap",)
    role = BY_NAME.get(str(name), "other")
    return ("gap",) if role == "adaptive" and _is_global(node) else (role,)


def _module_roles(module: nn.Module, node: fx.Node) -> tuple[str, ...]:
    if isinstance(module, NORMS):
        return _norm_roles(module)
    for types, role in BY_MODULE:
        if isinstance(module, types):
            return ("gap",) if role == "adaptive" and _is_global(node) else (role,)
    if node.meta.get("nothing"):
        return ("drop",)
    if next(module.parameters(), None) is not None:
        return ("other",)
    if behaves_as_relu(module):
        return ("relu",)
    return ("gap",) if _is_global(node) and behaves_as_mean(module) else ("other",)


def _norm_roles(module: nn.Module) -> tuple[str, ...]:
    """A norm class may bring its activation along (norm-act layers): told apart by running it beside the bare norm."""
    if not isinstance(module, _BatchNorm) or type(module).__module__.startswith("torch.nn"):
        return ("norm",)
    if module.running_mean is None or module.running_var is None:
        return ("norm",) if not list(module.children()) else ("other",)
    x = torch.linspace(
        -3, 3, 2 * module.num_features * 9, dtype=module.running_mean.dtype, device=module.running_mean.device
    )
    x = x.reshape(2, 3, 3, module.num_features).permute(0, 3, 1, 2).contiguous()
    arguments = (module.running_mean, module.running_var, module.weight, module.bias)
    with torch.no_grad():
        plain = nn.functional.batch_norm(x, *arguments, False, 0.0, module.eps)
        try:
            found = module(x.clone())
        except Exception:  # a norm that wants another shape: whatever it does, it is not a plain one
            return ("other",)
    if torch.allclose(found, plain):
        return ("norm",)
    return ("norm", "relu") if torch.allclose(found, plain.relu()) else ("norm", "act")


def behaves_as_relu(function: Any) -> bool:
    """Whether a parameter-free operation is max(x, 0), tried on numbers of either sign and several sizes."""
    x = torch.linspace(-40, 40, 2 * 4 * 6 * 6, dtype=torch.float64).reshape(6, 6, 2, 4).permute(2, 3, 0, 1).contiguous()
    try:
        with torch.no_grad():
            return bool(torch.equal(function(x.clone()), x.clamp(min=0)))
    except Exception:  # it does not accept such a tensor, so it is something else
        return False


def behaves_as_mean(function: Any) -> bool:
    """Whether a parameter-free operation averages over pixels."""
    x = torch.linspace(-2, 3, 2 * 4 * 6 * 6, dtype=torch.float64).square().reshape(2, 4, 6, 6)
    try:
        with torch.no_grad():
            return bool(torch.allclose(function(x.clone()).flatten(1), x.mean((2, 3))))
    except Exception:  # it does not accept such a tensor, so it is something else
        return False


def _is_relu_call(node: fx.Node, model: nn.Module) -> bool:
    inputs = [a for a in node.args if isinstance(a, fx.Node)]
    if len(inputs) != 1 or any(isinstance(v, fx.Node) for v in node.kwargs.values()) or node.args[0] is not inputs[0]:
        return False
    target = (lambda x, *a, **k: getattr(x, str(node.target))(*a, **k)) if node.op == "call_method" else node.target
    return behaves_as_relu(lambda x: target(x, *node.args[1:], **node.kwargs))  # type: ignore[operator]


def _is_global(node: fx.Node) -> bool:
    """Whether it averages a whole image: [B, C, H, W] to [B, C, 1, 1] or [B, C], and is an average."""
    source = node.all_input_nodes[0].meta.get("shape", ()) if node.all_input_nodes else ()
    shape = node.meta.get("shape", ())
    return len(source) == 4 and shape in (source[:2], (*source[:2], 1, 1))


def is_add(node: fx.Node) -> bool:
    """Whether it is a plain sum of two operands."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    plain = bool(node.kwargs.get("alpha", 1) == 1) and set(node.kwargs) <= {"alpha", "other"}
    return node.op in ("call_function", "call_method") and name in ADDS and plain and len(operands(node)) == 2


def is_product(node: Any) -> bool:
    name = _name(node)
    return name in ("mul", "mul_", "multiply", "imul") and len(operands(node)) == 2


def operands(node: fx.Node) -> tuple[Any, ...]:
    return (*node.args, *(v for k, v in node.kwargs.items() if k == "other"))


def one_minus(node: Any) -> fx.Node | None:
    """t, where the node is 1 - t in one of its spellings."""
    name = _name(node)
    if name is None:
        return None
    pair = operands(node)
    if len(pair) != 2 or node.kwargs.get("alpha", 1) != 1:
        return None
    if name == "rsub":
        pair = pair[::-1]
    if name in ("sub", "subtract", "rsub") and _is_one(pair[0]) and isinstance(pair[1], fx.Node):
        return pair[1]
    if name in ("add", "iadd"):  # 1 + (-t)
        for one, other in (pair, pair[::-1]):
            if _is_one(one) and _name(other) in ("neg", "negative"):
                inner = other.args[0]
                return inner if isinstance(inner, fx.Node) else None
    return None


def _is_one(value: Any) -> bool:
    if isinstance(value, fx.Node):
        return _name(value) in ("ones_like",)
    return isinstance(value, (int, float)) and value == 1


def _name(node: Any) -> str | None:
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    if node.target is operator.sub:
        return "sub"
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def conv_kernel(node: fx.Node, model: nn.Module) -> int:
    """The larger side of a convolution's kernel; 0 where it is not known."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return max(module.kernel_size) if isinstance(module, _ConvNd) else 0
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    shape = weight.meta.get("shape", ()) if isinstance(weight, fx.Node) else ()
    return int(max(shape[2:], default=0))
