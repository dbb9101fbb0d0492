"""The operator resens_fast::eval, one for all devices (csrc/ops.cpp): whether it is there, and its fake function."""

from __future__ import annotations

import functools
from collections.abc import Sequence

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
