"""What the C++ operators need beside their kernels: resens_fast::eval's fake function, and that none has a backward."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import extension


def has_kernel(device_type: str) -> bool:
    """Whether the extension evaluates on such devices ("cpu", "cuda"); the operator is then known to tracing too."""
    if extension.module() is None:
        return False
    _register_fake()
    return torch._C._dispatch_has_kernel_for_dispatch_key("resens_fast::eval", device_type.upper())


@functools.cache
def _register_fake() -> None:
    torch.library.register_fake("resens_fast::eval", _eval)
    refuse_backward("eval")


@functools.cache
def _library() -> torch.library.Library:
    return torch.library.Library("resens_fast", "FRAGMENT")  # kernels live as long as it does


def refuse_backward(name: str) -> None:
    """Let an operator raise where a gradient through it is asked for.

    Without this PyTorch warns at most, and the backward leaves no gradient.
    """
    operator = getattr(torch.ops.resens_fast, name).default

    def kernel(*arguments: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            for given in (*arguments, *options.values()):
                for value in given if isinstance(given, (list, tuple)) else (given,):
                    if isinstance(value, Tensor) and value.requires_grad:
                        raise NotImplementedError(
                            f"resens_fast::{name} has no backward, and one of its arguments requires a gradient: "
                            "detach it, or use net(images, configuration), which is differentiable"
                        )
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments, **options)

    _library().impl(name, kernel, "Autograd")


def _eval(
    images: Tensor,
    labels: Tensor,
    layout: Tensor,
    packed: Tensor,
    program: Sequence[Tensor],
    words: int,
    logits: int,
    threads: int,
    tile: int,
    isa: str = "",
    rounded: bool = True,
    control: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    # Shapes for torch.compile and opcheck: a fake program cannot be read, so the number of words is an argument.
    # One argument on the meta device among real ones also leads here, where nothing is computed.
    given = [images, labels, layout, packed, *program, *([] if control is None else [control])]
    meta = [tensor.is_meta for tensor in given]
    if any(meta) and not all(meta):
        raise ValueError("resens_fast::eval was given tensors on the meta device among real ones")
    counts = images.new_empty((3, words), dtype=torch.int64)
    return counts, images.new_empty((words, images.shape[0], logits) if logits else (0,), dtype=torch.float32)
