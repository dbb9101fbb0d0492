"""Cases of test_triton_values.py for one block as differentiable operators, and for the whole package by the engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import resens_fast as rf
from resens_fast import fused
from tests import triton_cases as base
from tests.conftest import small_resnet


def leaves(block: fused.FusedBlock, dtype: torch.dtype) -> tuple[fused.FusedBlock, list[torch.Tensor]]:
    """The block in that type with parameters that require gradients, and the list of these."""
    typed = fused.convert(block, dtype)
    side = typed.shortcut.conv
    convs = [*typed.convs, *([side] if side else [])]
    own = [t.clone().requires_grad_() for c in convs for t in (c.weight, c.bias)]
    fresh = [fused.dataclasses.replace(c, weight=own[2 * i], bias=own[2 * i + 1]) for i, c in enumerate(convs)]
    shortcut = fused.dataclasses.replace(typed.shortcut, conv=fresh[-1]) if side else typed.shortcut
    typed = fused.dataclasses.replace(typed, convs=tuple(fresh[: len(typed.convs)]), shortcut=shortcut)
    if typed.scale is not None and typed.shift is not None:
        own += [typed.scale.clone().requires_grad_(), typed.shift.clone().requires_grad_()]
        typed = fused.dataclasses.replace(typed, scale=own[-2], shift=own[-1])
    return typed, own


def plain(block: fused.FusedBlock, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """The block by PyTorch, image groups and their gates one by one."""
    each = len(x) // len(gates)
    parts = [block(x[i * each : (i + 1) * each], float(gate)) for i, gate in enumerate(gates)]
    return torch.cat(parts)


def kernels(block: fused.FusedBlock, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    from resens_fast.kernels import block as operators
    from resens_fast.kernels.pack import width

    channels = x.shape[1]
    wide = F.pad(x.permute(0, 2, 3, 1), (0, width(channels) - channels))
    y = operators.run(block, wide, gates)
    n = block.convs[-1].weight.shape[0]
    assert not y[..., n:].any(), "the channels that fill up are not zero"
    return y[..., :n].permute(0, 3, 1, 2)


def run_block(name: str, transition: bool, dtype: torch.dtype, count: int) -> base.Result:
    """Output and gradients of a block under `count` gates; the bound is four times PyTorch's own error."""
    whole, _ = base.network(name)
    # The last: behind a stride, and with a pool where the network has one.
    block = [b for b in whole.blocks if (b.shape_in != b.shape_out) == transition][-1]
    g = torch.Generator().manual_seed(21)
    # Zero where a ReLU closes the block before, so that zeros occur.
    image = torch.randn(2, *block.shape_in, generator=g)
    image = image.relu() if block.closing_relu else image
    weight = torch.randn(2, *block.shape_out, generator=g)
    gates = torch.tensor([1.0, -0.4])[:count]

    def results(run: Any, to: torch.dtype) -> list[torch.Tensor]:
        typed, own = leaves(block, to)
        x = image.to(to).requires_grad_()
        y = run(typed, x, gates)
        return [y.detach().double()] + [v.double() for v in torch.autograd.grad((y * weight.to(to)).sum(), [x, *own])]

    exact, eager, found = results(plain, torch.float64), results(plain, dtype), results(kernels, dtype)
    worst: base.Result = {"error": 0.0, "bound": 1.0}  # in units of what is allowed
    for i, (right, theirs, ours) in enumerate(zip(exact, eager, found, strict=True)):
        allowed = 4 * base.rms(theirs - right) + 4 * torch.finfo(dtype).eps * base.rms(right)
        worst["error"] = max(worst["error"], base.rms(ours - right) / allowed)
        if worst["error"] > 1 and "part" not in worst:
            worst["part"] = i
    return worst


def run_operators() -> base.Result:
    """torch.library's own checks: schema, fake functions, registration of autograd, tracing with unknown sizes."""
    from resens_fast.kernels import block as operators

    kinds = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    for name, transition, checks in (("pre-projection-17-48", True, 2), ("post-pooled-pad-3-10", False, 4)):
        whole, _ = base.network(name)
        block = next(b for b in whole.blocks if (b.shape_in != b.shape_out) == transition)
        typed, _ = leaves(block, torch.float32)
        stored = -(-block.shape_in[0] // 16) * 16
        x = torch.zeros(2, *block.shape_in[1:], stored)
        x[..., : block.shape_in[0]] = torch.randn(2, *block.shape_in[1:], block.shape_in[0])
        given = operators.parameters(typed, torch.ones(1))
        torch.library.opcheck(
            torch.ops.resens_fast.triton_block.default, (x.requires_grad_(), *given), test_utils=kinds[:checks]
        )
        made = [v.detach() for v in torch.ops.resens_fast.triton_block(x, *given)]
        arguments = (torch.randn_like(made[0]), made, True, x.detach(), *operators.parameters(block, torch.ones(1)))
        torch.library.opcheck(torch.ops.resens_fast.triton_block_backward.default, arguments, test_utils=kinds[:2])
    given = operators.parameters(typed, torch.ones(1, requires_grad=True))
    try:
        torch.ops.resens_fast.triton_block(x, *given)[0].sum().backward()
    except NotImplementedError:
        return {"error": 0.0, "bound": 0.0}
    return {"failure": "a gradient with respect to gates was not refused"}


def run_masked(preactivation: bool) -> base.Result:
    """net(x, mask=..., engine="triton") and all gradients, masks per batch and per image, against float64."""
    model = small_resnet(preactivation=preactivation, depth=8)
    net = rf.wrap(model, torch.zeros(1, 3, 8, 8))
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(22))
    per_image = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.5, 0.0], [1.0, 0.0, 2.0]])
    worst = 0.0
    for mask in (per_image, torch.tensor([0.5, 1.0, 0.0])):
        gradients = []
        for engine, dtype in (("triton", torch.float32), (None, torch.float64)):
            net = net.to(dtype)
            image = x.to(dtype).requires_grad_()
            y = net(image, mask=mask, engine=engine)
            found = torch.autograd.grad(y.square().sum(), [image, *net.parameters()], allow_unused=True)
            gradients.append([y, *found])
        for ours, right in zip(*gradients, strict=True):
            if (ours is None) != (right is None):
                return {"failure": "a parameter has a gradient in one of the two only"}
            if ours is not None and right is not None:
                worst = max(worst, float((ours - right).abs().max().detach() / (right.abs().max().detach() + 1e-6)))
    return {"error": worst, "bound": 1e-5}


def run_refusals() -> base.Result:
    """What net(x, mask=..., engine="triton") cannot do, it says."""
    net = rf.wrap(small_resnet(depth=8), torch.zeros(1, 3, 8, 8))
    x, mask = torch.zeros(1, 3, 8, 8), torch.ones(3)
    tries: list[tuple[str, Any]] = [
        ("gates", lambda: net(x, mask=mask.clone().requires_grad_(), engine="triton")),
        ("only engine", lambda: net(x, mask=mask, engine="cuda")),
        ("with a mask", lambda: net(x, engine="triton")),
        ("float64", lambda: net.double()(x.double(), mask=mask, engine="triton")),
        ("training mode", lambda: net.float().train()(x, mask=mask, engine="triton")),
    ]
    for words, call in tries:
        try:
            call()
        except rf.errors.EngineError as error:
            if words in str(error):
                continue
            return {"failure": f"{words!r} is not in {error}"}
        return {"failure": f"nothing was said about {words!r}"}
    return {"error": 0.0, "bound": 0.0}


def run_changed() -> base.Result:
    """A network changed after its first forward under a mask is looked at again."""
    mask, x = torch.ones(3), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(25))

    def own_forward(net: Any) -> None:
        net.model.get_submodule("blocks.0.conv1").forward = lambda value: value

    class Double(torch.nn.BatchNorm2d):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(value)

    def other_module(net: Any) -> None:
        before = net.model.get_submodule("blocks.0.bn1")
        net.model.set_submodule("blocks.0.bn1", Double(before.num_features).eval())

    def dilation(net: Any) -> None:
        net.model.get_submodule("blocks.0.conv1").dilation = (2, 2)

    def for_all(net: Any) -> None:
        torch.nn.modules.module.register_module_forward_hook(lambda module, given, value: 2 * value)

    for change in (own_forward, other_module, dilation, for_all):
        model = rf.models.resnet(8, preactivation=False, option="pad", width=4, classes=5)
        net = rf.wrap(model.eval(), torch.zeros(1, 3, 8, 8))
        before = torch.random.get_rng_state()
        net(x, mask=mask, engine="triton")
        if not torch.equal(torch.random.get_rng_state(), before):
            return {"failure": "torch's random numbers have moved on"}
        try:
            change(net)
            net(x, mask=mask, engine="triton")
        except rf.errors.EngineError:
            continue
        finally:
            torch.nn.modules.module._global_forward_hooks.clear()
        return {"failure": f"{change.__name__} was not noticed"}
    return {"error": 0.0, "bound": 0.0}


def run_odd() -> base.Result:
    """An empty batch under a mask; everything where the default type is another; derivatives of derivatives refused."""
    model = small_resnet(depth=8, preactivation=False)
    net = rf.wrap(model, torch.zeros(1, 3, 8, 8))
    x, labels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(26)), torch.tensor([1])
    for mask in (torch.ones(3), torch.zeros(3), torch.ones(0, 3)):
        if net(x[:0], mask=mask, engine="triton").shape != (0, 5):
            return {"failure": "an empty batch has other logits than [0, 5]"}

    def everything() -> list[torch.Tensor]:
        sweep = rf.sweeps.single(net)[:2]
        image = x.clone().requires_grad_()
        y = net(image, mask=[1, 0.5, 1], engine="triton")
        return [
            rf.logits(net, sweep, x, engine="triton"),
            rf.input_gradients(net, sweep, x, labels, engine="triton"),
            *torch.autograd.grad(y.sum(), [image, *net.parameters()]),
        ]

    found = [everything()]
    for kind in (torch.float64, torch.float16):
        torch.set_default_dtype(kind)
        try:
            found.append(everything())
        finally:
            torch.set_default_dtype(torch.float32)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            if a.dtype != b.dtype or not torch.equal(a, b):
                return {"failure": "the default type changes results"}

    image = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(net(image, mask=torch.ones(3), engine="triton").sum(), image, create_graph=True)
    try:
        g.sum().backward()
    except NotImplementedError as error:
        return {"error": float("first derivatives only" not in str(error)), "bound": 0.0}
    return {"failure": "a second derivative was not refused"}


def run_sure() -> base.Result:
    """Norms where the label leads by 150, so that no other class has a softmax that float32 holds."""
    net = rf.wrap(small_resnet(depth=8), torch.zeros(1, 3, 8, 8))
    with torch.no_grad():
        net.model.get_submodule("fc").bias[2] += 150  # type: ignore[operator,union-attr]
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(24))
    paths = rf.sweeps.from_masks(net, [[1, 0, 1]])
    ours, right = (
        rf.path_gradients(net, (images, torch.tensor([2, 2])), paths=paths, engine=engine).frame["norm"]
        for engine in ("triton", "reference")
    )
    if not (right < 1e-60).all():
        return {"failure": f"the norms are {list(right)}"}
    return {"error": float(abs(ours / right - 1).max()), "bound": 1e-4}


def run_package() -> base.Result:
    """Logits, tallies, path gradients and input gradients through the package agree with the reference engine."""
    net = rf.wrap(small_resnet(depth=8), torch.zeros(1, 3, 8, 8))
    g = torch.Generator().manual_seed(23)
    images, labels = torch.randn(3, 3, 8, 8, generator=g), torch.randint(0, 5, (3,), generator=g)
    sweep = rf.sweeps.intact(net) + rf.sweeps.single(net) + rf.sweeps.from_gates(net, [[0.5, 1.5, -1]])
    exact = rf.logits(net, sweep, images, engine="reference")
    found = rf.logits(net, sweep, images, engine="triton")
    ours = rf.evaluate(net, sweep, (images, labels), engine="triton").frame
    right = rf.evaluate(net, sweep, (images, labels), engine="reference").frame
    if list(ours["errors"]) != list(right["errors"]) or list(ours["images"]) != [3] * len(sweep):
        return {"failure": f"errors {list(ours['errors'])} instead of {list(right['errors'])}"}
    if not np.allclose(ours["loss"], right["loss"], rtol=1e-5):
        return {"failure": f"losses {list(ours['loss'])} instead of {list(right['loss'])}"}
    if base.rms(found.double() - exact) > 1e-5 * base.rms(exact):
        return {"failure": f"the logits are off by {base.rms(found.double() - exact)}"}

    paths = rf.sweeps.from_masks(net, [[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]])
    frames = [
        rf.path_gradients(net, (images, labels), paths=paths, batch=2, engine=engine).frame
        for engine in ("triton", "reference")
    ]
    for column in frames[1].select_dtypes("number"):
        if not np.allclose(*(frame[column] for frame in frames), rtol=1e-5):
            return {"failure": f"{column}: {list(frames[0][column])} instead of {list(frames[1][column])}"}
    ours, right = (rf.input_gradients(net, paths, images, labels, engine=e) for e in ("triton", "reference"))
    return {"error": base.rms(ours.double() - right), "bound": 1e-5 * base.rms(right)}


def cases() -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name in base.NETWORKS:
        for side in ("transition", "identity"):
            for dtype, count in (("float32", 2), ("float16", 1)):
                table[f"block-{name}-{side}-{dtype}"] = lambda n=name, s=side, d=dtype, c=count: run_block(
                    n, s == "transition", base.DTYPES[d], c
                )
    table |= {f"masked-{name}": lambda p=pre: run_masked(p) for name, pre in (("pre", True), ("post", False))}
    return table | {"operators": run_operators, "refusals": run_refusals, "package": run_package, "sure": run_sure,
                    "changed": run_changed, "odd": run_odd}  # fmt: skip
