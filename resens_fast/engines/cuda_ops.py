"""Fake functions of the CUDA operators (csrc/cuda/ops_cuda.cpp): shapes without data, for tracing and torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extension


@functools.cache
def register() -> bool:
    """Load the operators and register their fake functions; False when the extension has no CUDA part."""
    if extension.module() is None or not hasattr(torch.ops.resens_fast, "eval_cuda"):
        return False
    torch.library.register_fake("resens_fast::stem_cuda", _stem)
    torch.library.register_fake("resens_fast::eval_cuda", _eval)
    return True


def _stem(images: Tensor, parameters: Tensor, relu: bool, multiple: int) -> Tensor:
    padded = (images.shape[0] + multiple - 1) // multiple * multiple
    return images.new_empty((padded, 32, 32, 16), dtype=torch.float32)


def _eval(
    weights: Tensor,
    parameters: Tensor,
    states: Tensor,
    labels: Tensor,
    tape: Tensor,
    chunks: Tensor,
    parts: Tensor,
    slots: int,
    words: int,
    head: Sequence[int],
    images: int,
    ctas: int,
    fp16: bool,
    with_logits: bool,
) -> tuple[Tensor, Tensor]:
    tally = states.new_empty((words, 3), dtype=torch.int64)
    return tally, states.new_empty((words if with_logits else 0, labels.shape[0], head[3]))
