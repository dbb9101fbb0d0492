"""wrap(): turn a residual or sequential PyTorch classifier into stem, blocks and head, checked against the original."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, fx, nn

from resens_fast.blocks import Block, BlockRecipe, kind_of
from resens_fast.cut import BlockCut, NetworkCut, cut
from resens_fast.errors import WrapError, first_line
from resens_fast.network import Recipe, ResidualNetwork
from resens_fast.piece import Piece
from resens_fast.roles import conv_kernel, roles
from resens_fast.structure import Shape, Structure
from resens_fast.trace import trace

TOLERANCE = 1e-9  # of the largest logit, in float64: the pieces do the same operations, only a highway's order differs

OUTER = {
    nn.DataParallel: "module",
    nn.parallel.DistributedDataParallel: "module",
}


def wrap(model: nn.Module, example: Tensor | None = None) -> ResidualNetwork:
    """Find the residual blocks of a classifier and return it as a ResidualNetwork, checked on a probe batch.

    `example` is a batch [B, C, H, W] of the image size the network works on (its values do not matter); without it the
    size is the model's own `input_shape` (C, H, W) if it has one, else guessed from its first convolution. The model
    itself is shared and left as it was. Raises WrapError when it is not an nn.Module, its forward cannot be traced,
    nothing residual or sequential is found, or the parts put together differ from it.
    """
    if isinstance(model, ResidualNetwork):
        model = model.model
    if not isinstance(model, nn.Module):
        raise WrapError(f"wrap() needs a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise WrapError("wrap() cannot look into a TorchScript module; pass the Python model it was made from")
    for kind, inner in OUTER.items():
        if isinstance(model, kind):
            raise WrapError(f"wrap() cannot look into {type(model).__name__}; pass model.{inner}")
    if "_orig_mod" in model._modules:  # torch.compile's; its class lives in a module that is slow to import
        raise WrapError(f"wrap() cannot look into {type(model).__name__}; pass model._orig_mod")
    if any(p.is_meta for p in itertools.chain(model.parameters(), model.buffers())):
        raise WrapError("the model is on the meta device, which keeps no values; load its weights first")
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        twin = _double_copy(model)
        images = _probe_images(twin, example)
        expected = _run_model(twin, images)
        graph, whole = trace(twin, images)
        try:
            found = cut(graph, twin)
        except WrapError as error:
            hint = "".join(f"; module {path} stayed whole because {reason}" for path, reason in list(whole.items())[:1])
            raise WrapError(f"{error}{hint}") from None
        recipe = _recipe(found, twin, images, expected)
        _verify(recipe, twin, images, expected)
    return ResidualNetwork(model, recipe)


def _double_copy(model: nn.Module) -> nn.Module:
    """A private float64 copy in eval mode: probing must not touch the model's statistics, gradients or flags."""
    try:
        twin = copy.deepcopy(model)
        if any(p.device.type == "mps" for p in twin.parameters()):  # has no float64
            twin = twin.cpu()
        return twin.double().eval().requires_grad_(False)
    except Exception as error:
        raise WrapError(f"the model cannot be copied for probing: {first_line(error)}") from error


def _probe_images(model: nn.Module, example: Tensor | None) -> Tensor:
    """Two random images of the example's size, or of the first usual size that the model accepts."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def images(shape: Shape) -> Tensor:
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64, device="cpu").to(device)

    if example is not None:
        if not isinstance(example, Tensor) or example.ndim != 4:
            shape = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
            raise WrapError(f"example must be a batch of images [B, C, H, W], got {shape}")
        return images((example.shape[1], example.shape[2], example.shape[3]))
    known = getattr(model, "input_shape", None)  # networks that ship with the package say it
    if isinstance(known, tuple) and len(known) == 3 and all(isinstance(size, int) for size in known):
        return images(known)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    if not convs:
        raise WrapError(
            "the image size cannot be guessed without a Conv2d module; pass example=torch.zeros(1, C, H, W)"
        )
    channels = convs[0].in_channels
    large = max(convs[0].stride) > 1 or max(convs[0].kernel_size) >= 7  # an ImageNet stem
    sizes = (224, 256, 299, 64, 32) if large else (32, 28, 64, 224, 256, 299)
    reason = ""
    for size in sizes:
        probe = images((channels, size, size))
        try:
            with torch.no_grad():
                model(probe.clone())
            return probe
        except Exception as error:
            reason = reason or first_line(error)
    raise WrapError(
        f"the model accepts no {channels}-channel image of {sizes} pixels ({reason}); "
        "pass example=torch.zeros(1, C, H, W)"
    )


def _run_model(model: nn.Module, images: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            logits = model(images.clone())  # some models write into their input
    except Exception as error:
        raise WrapError(f"the model fails on images of shape {tuple(images.shape)}: {first_line(error)}") from error
    if not isinstance(logits, Tensor):
        raise WrapError(f"the model returns {type(logits).__name__}, wrap() needs one tensor of logits [B, classes]")
    if logits.ndim != 2 or logits.shape[0] != images.shape[0]:
        raise WrapError(
            f"the model turns {tuple(images.shape)} into {tuple(logits.shape)}, wrap() needs logits [B, classes]"
        )
    if not logits.isfinite().all():
        raise WrapError(
            "the model's own logits on random images are not finite, so nothing can be checked; is it initialised?"
        )
    return logits


def _recipe(found: NetworkCut, model: nn.Module, images: Tensor, logits: Tensor) -> Recipe:
    stem = Piece(found.stem, [found.image], model)
    head = Piece(found.logits, [found.blocks[-1].y], model)
    shapes = [_shape(found.stem)] + [_shape(block.y) for block in found.blocks]
    positive = [_never_negative(found.stem, model)] + [_never_negative(block.y, model) for block in found.blocks]
    stages = _stages(shapes)
    blocks = []
    for i, block in enumerate(found.blocks):
        # Any block of this output shape, and the stem, may hand its state to block i once blocks are moved or deleted.
        arriving = all(sign for shape, sign in zip(shapes, positive, strict=True) if shape == shapes[i])
        blocks.append(_block(i, block, model, shapes[i], shapes[i + 1], stages[i], arriving))
    channels, height, width = images.shape[1:]
    structure = Structure(
        names=tuple(b.name for b in blocks),
        stages=tuple(stages),
        kinds=tuple(b.kind for b in blocks),
        transitions=tuple(b.shape_in != b.shape_out for b in blocks),
        deletable=tuple(b.deletable for b in blocks),
        drops=tuple(b.drops for b in blocks),
        gateable=tuple(b.gateable for b in blocks),
        shapes_in=tuple(shapes[:-1]),
        shapes_out=tuple(shapes[1:]),
        input_shape=(channels, height, width),
        classes=logits.shape[1],
    )
    return Recipe(stem, tuple(blocks), head, structure)


def _block(
    i: int, b: BlockCut, model: nn.Module, shape_in: Shape, shape_out: Shape, stage: int, arriving: bool
) -> BlockRecipe:
    prologue = Piece(b.p, [b.x], model)
    branch = Piece(b.branch, [b.p], model)
    shortcut = Piece(b.shortcut, [b.p], model)
    closing = Piece(b.y, [b.sum], model)
    kernels = [conv_kernel(n, model) for n in branch.nodes if "conv" in roles(n, model)]
    kind = kind_of(prologue, branch, closing, b.transform is not None, kernels) if b.gateable else "plain"
    through = all(n.meta.get("nothing") for n in (*prologue.nodes, *shortcut.nodes))
    silent = not closing.nodes or (arriving and closing.chain() == ("relu",))
    return BlockRecipe(
        index=i,
        name=b.name,
        stage=stage,
        kind=kind,
        prologue=prologue,
        branch=branch,
        shortcut=shortcut,
        closing=closing,
        transform=Piece(b.transform, [b.p], model) if b.transform is not None else None,
        gateable=b.gateable,
        deletable=_shape(b.shortcut) == _shape(b.sum),
        drops=through and silent and _shape(b.shortcut) == _shape(b.sum),
        shape_in=shape_in,
        shape_out=shape_out,
    )


def _shape(node: fx.Node) -> Shape:
    shape = node.meta["shape"]
    if len(shape) != 4:
        raise WrapError(f"the state at {node.name} has shape {tuple(shape)}, wrap() needs [B, C, H, W] between blocks")
    return shape[1], shape[2], shape[3]


def _stages(shapes: list[Shape]) -> list[int]:
    """1-based stage of every block: a run of blocks whose outputs have one shape."""
    runs = itertools.groupby(shapes[1:])
    return [stage for stage, (_, run) in enumerate(runs, start=1) for _ in run]


def _never_negative(node: fx.Node, model: nn.Module) -> bool:
    """Whether a state comes out of a ReLU, perhaps pooled; unknown counts as no."""
    while True:
        steps = roles(node, model)
        if steps and steps[-1] == "relu":
            return True
        if not steps or steps[-1] not in ("maxpool", "avgpool", "drop") or len(node.all_input_nodes) != 1:
            return False
        node = node.all_input_nodes[0]


def _verify(recipe: Recipe, model: nn.Module, images: Tensor, expected: Tensor) -> None:
    with torch.no_grad():
        state = recipe.stem(model, images)
        for block in recipe.blocks:
            state = Block(block, model).run(state)
        logits = recipe.head(model, state)
        again = model(images.clone())
    scale = max(1.0, float(expected.abs().max()))
    if float((again - expected).abs().max()) > TOLERANCE * scale:
        raise WrapError(
            "the model gives different logits for the same images in eval mode; wrap() needs a deterministic model"
        )
    if float((_run_model(model, images[:1]) - expected[:1]).abs().max()) > TOLERANCE * scale:
        raise WrapError(
            "the model's logits of an image change with the other images of the batch (a norm without running "
            "statistics?); wrap() needs a model that looks at each image alone"
        )
    difference = float((logits - expected).abs().max())
    if not difference <= TOLERANCE * scale:
        raise WrapError(
            f"stem, {len(recipe.blocks)} blocks and head put together differ from the model by {difference:.3g} "
            "on a probe batch; does its forward depend on more than the image?"
        )
