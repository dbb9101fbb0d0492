"""A wrapped network: the model itself, plus its blocks as things that can be deleted, moved and scaled."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from resens_fast import masks
from resens_fast.blocks import Block, BlockRecipe
from resens_fast.errors import DataError, EngineError, SweepError, first_line
from resens_fast.hooks import passed_by
from resens_fast.piece import Piece
from resens_fast.structure import Shape, Structure

OWN = frozenset({"model", "recipe", "blocks", "structure", "input_shape", "fast_forward"})


class Configured(Protocol):
    """One variant of the network: blocks in the order they run, and the gate of every block."""

    @property
    def order(self) -> tuple[int, ...]: ...
    @property
    def gates(self) -> tuple[float, ...]: ...


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A cut network without its parameters: shared by all copies of a ResidualNetwork."""

    stem: Piece
    blocks: tuple[BlockRecipe, ...]
    head: Piece
    structure: Structure


class ResidualNetwork(nn.Module):
    """A drop-in for `model`: same outputs, parameters and state_dict under the same names, plus stem, blocks and head.

    Made by `wrap`. It shares the model's own parameters and modules: training, moving or loading either of the two
    changes both.
    """

    model: nn.Module
    recipe: Recipe
    blocks: tuple[Block, ...]
    structure: Structure
    input_shape: Shape
    # A fused engine for intact forwards in eval without gradients hooks in here; it returns None to decline.
    fast_forward: Callable[[Tensor], Tensor | None] | None

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.__dict__["model"] = model  # not through nn.Module, which would register it and prefix every name
        super().__init__()
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = model.__dict__[name]
        self.__dict__.pop("training", None)
        self.recipe = recipe
        self.blocks = tuple(Block(block, model) for block in recipe.blocks)
        self.structure = recipe.structure
        self.input_shape = recipe.structure.input_shape
        from resens_fast.engines.cpu import FastForward

        self.fast_forward = FastForward(self)

    def stem(self, x: Tensor) -> Tensor:
        """The state [B, C, H, W] that the first block receives, for images [B, C, H, W]."""
        return self.recipe.stem(self.model, x)

    def head(self, state: Tensor) -> Tensor:
        """Logits [B, classes] of the state after the last block; the state is left as it was."""
        return self.recipe.head(self.model, state)

    def forward(
        self, x: Tensor, configuration: Configured | None = None, mask: Any = None, engine: str | None = None
    ) -> Tensor:
        """Logits [B, classes] of the model itself, or of one variant of it; differentiable, in training mode too.

        A variant is a configuration of a sweep, or a mask over the n blocks: [n] for the whole batch or [B, n] with a
        row per image, True or 1 to keep a block, False or 0 to delete it, another number to scale its branch.
        With a mask and engine="triton" the blocks run as Triton kernels, in eval mode (batch norms frozen).
        Raises DataError for images of another kind than the network's, SweepError for a configuration or mask that
        does not fit it, or for both at once, EngineError for a forward hook that the variant would pass by.
        """
        self.check_images(x)
        if engine not in (None, "triton") or (engine and mask is None):
            raise EngineError(f'engine={engine!r} is not possible here: only engine="triton", and with a mask')
        if configuration is not None and mask is not None:
            raise SweepError("a configuration has gates of its own: give either a configuration or a mask, not both")
        if (configuration is not None or mask is not None) and (hook := passed_by(self, engine == "triton")):
            raise EngineError(f"this variant cannot be run: {hook}")
        try:
            if mask is not None:
                return masks.forward(self, x, mask, engine)
            if configuration is None:
                return self._intact(x)
            return self._variant(x, configuration)
        except (RuntimeError, AssertionError) as error:
            if tuple(x.shape[1:]) == self.input_shape:
                raise
            raise DataError(
                f"images of shape {tuple(x.shape[1:])} do not pass through the network, "
                f"which was wrapped for {self.input_shape}: {first_line(error)}"
            ) from error

    def _intact(self, x: Tensor) -> Tensor:
        if self.fast_forward is not None and not self.training and not torch.is_grad_enabled():
            fast = self.fast_forward(x)
            if fast is not None:
                return fast
        result: Tensor = self.model(x)
        return result

    def _variant(self, x: Tensor, configuration: Configured) -> Tensor:
        if not (hasattr(configuration, "order") and hasattr(configuration, "gates")):
            raise SweepError(
                f"a configuration is an element of a sweep, such as sweep[0], not {type(configuration).__name__}"
            )
        order, gates = tuple(configuration.order), tuple(configuration.gates)
        n = len(self.blocks)
        if sorted(order) != list(range(n)) or len(gates) != n:
            raise SweepError(
                f"the configuration has {len(order)} positions and {len(gates)} gates, the network has {n} blocks"
            )
        self._check_order(order)
        state = self.stem(x)
        for j in order:
            block, gate = self.blocks[j], gates[j]
            if gate == 0.0 and block.drops and not self.training:
                continue
            state = block.run(state, gate)
        return self.head(state)

    def _check_order(self, order: tuple[int, ...]) -> None:
        shape = self.blocks[0].shape_in
        for j in order:
            if self.blocks[j].shape_in != shape:
                raise SweepError(
                    f"block {j} expects a state of shape {self.blocks[j].shape_in} but would get {shape}; "
                    "only move blocks among equal shapes"
                )
            shape = self.blocks[j].shape_out

    def check_images(self, x: Tensor) -> None:
        """Raise DataError unless x is a floating-point batch [B, C, H, W] with the network's channels."""
        channels, height, width = self.input_shape
        expected = f"expected images [B, {channels}, {height}, {width}]"
        if not isinstance(x, Tensor):
            raise DataError(f"{expected}, got {type(x).__name__}")
        if x.ndim != 4 or x.shape[1] != channels:
            raise DataError(f"{expected}, got a tensor of shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise DataError(f"{expected} in floating point, got {x.dtype}; scale and normalise the images first")

    @property
    def device(self) -> torch.device:
        tensor = next(self.model.parameters(), None)
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    def summary(self) -> str:
        """A table with one line per block: name, stage, kind, shapes and parameters; then the engine that `auto` will
        take where the network is now, and why it passes over the faster ones, naming the first block not covered.
        """
        rows = [("", "block", "stage", "kind", "shape", "parameters", "deleted")]
        for b in self.blocks:
            count = sum(parameter.numel() for parameter in b.parameters())
            shape = "x".join(map(str, b.shape_out))
            if b.is_transition:
                shape = "x".join(map(str, b.shape_in)) + " -> " + shape
            deleted = (
                "no"
                if not b.deletable
                else "nothing runs"
                if b.drops
                else "shortcut runs"
                if b.gateable
                else "pooling runs"
            )
            rows.append((str(b.index), b.name, str(b.stage), b.kind, shape, f"{count:,}", deleted))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        total = sum(p.numel() for p in self.model.parameters())
        s = self.structure
        size = "x".join(map(str, s.input_shape))
        title = (
            f"{type(self.model).__name__}: {len(s)} blocks, {total:,} parameters, images {size}, {s.classes} classes"
        )
        return "\n".join([title, *lines, *self._engines()])

    def _engines(self) -> list[str]:
        from resens_fast import engines

        try:
            engine, passed = engines.choose("auto", self, self.device, self.dtype)
            lines = [f'engine="auto" takes {engine.name} ({str(self.dtype).removeprefix("torch.")}, {self.device})']
        except EngineError as reason:
            return [f'engine="auto": {reason}']
        return lines + [f"  not {name}: {reason}" for name, reason in passed.items()]

    def fingerprint(self) -> str:
        """The sha256 of structure and state_dict: equal for equal networks on any device."""
        digest = hashlib.sha256(self.structure.digest.encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
                flat = value.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        return digest.hexdigest()

    # Everything below makes the wrapper disappear: the model's own methods answer.

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Names of our own come first, also where the model has a child called `blocks`; all others are the model's.
        if name in OWN:
            self.__dict__[name] = value
        else:
            setattr(self.model, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.model, name)

    def get_submodule(self, target: str) -> nn.Module:
        return self.model.get_submodule(target)

    def get_parameter(self, target: str) -> nn.Parameter:
        return self.model.get_parameter(target)

    def get_buffer(self, target: str) -> Tensor:
        return self.model.get_buffer(target)

    def train(self, mode: bool = True) -> ResidualNetwork:
        self.model.train(mode)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ResidualNetwork:
        self.model._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> ResidualNetwork:
        self.model.apply(fn)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.model._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{len(self.blocks)} blocks"

    def __deepcopy__(self, memo: dict[int, Any]) -> ResidualNetwork:
        twin = ResidualNetwork(copy.deepcopy(self.model, memo), self.recipe)
        memo[id(self)] = twin
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        # Sub-graphs are compiled functions, which do not pickle: the copy is cut anew from the model.
        return _rewrap, (self.model, self.input_shape)


def _rewrap(model: nn.Module, input_shape: Shape) -> ResidualNetwork:
    from resens_fast.wrap import wrap

    return wrap(model, torch.zeros(1, *input_shape, device="cpu"))
