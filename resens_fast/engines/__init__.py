"""Engines execute a plan; this room knows which there are, what each one covers and which is the fastest for a job.

A new engine is one file with one `Engine` subclass, listed in `_REGISTRY` in order of preference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import EngineError
from ..hooks import passed_by
from .base import AT, LOSS_SCALE, Engine, Executor, GradientExecutor, Progress, Tally

if TYPE_CHECKING:
    import torch  # only here: at run time ``engines.torch`` is the engine of that name

    from ..gradient_plan import GradientPlan
    from ..network import ResidualNetwork

__all__ = [
    "AT",
    "LOSS_SCALE",
    "Engine",
    "Executor",
    "GradientExecutor",
    "Progress",
    "Tally",
    "choose",
    "choose_for_gradients",
    "get",
    "names",
]

# Fastest first; `auto` never takes the reference engine.
_REGISTRY = {
    "cuda": "CudaEngine",
    "triton": "TritonEngine",
    "cpu": "CpuEngine",
    "torch": "TorchEngine",
    "reference": "ReferenceEngine",
}


def names() -> tuple[str, ...]:
    """The engines of this package, fastest first, whether or not this machine can run them."""
    return tuple(_REGISTRY)


def get(name: str) -> Engine:
    """The engine of that name; EngineError lists the names there are."""
    if name not in _REGISTRY:
        raise EngineError(f"unknown engine {name!r}; choose auto, {', '.join(_REGISTRY)}")
    engine = getattr(import_module(f".{name}", __name__), _REGISTRY[name])()
    assert isinstance(engine, Engine)
    return engine


def choose(
    name: str, net: ResidualNetwork, device: torch.device, dtype: torch.dtype, size: tuple[int, ...] | None = None
) -> tuple[Engine, dict[str, str]]:
    """The engine to use for images of the shape ``size`` (C, H, W; the network's own when None).

    With it, for each engine that ``auto`` passed over the reason.
    A named engine is returned or refused with EngineError, which names the block it does not cover; nothing falls
    back in silence.
    """
    return _choose(name, lambda engine: engine.refuses(net, device, dtype), net, size)


def choose_for_gradients(
    name: str,
    net: ResidualNetwork,
    plans: Sequence[GradientPlan],
    device: torch.device,
    dtype: torch.dtype,
    at: str,
    size: tuple[int, ...] | None = None,
) -> tuple[Engine, dict[str, str]]:
    """The engine to take all these paths' gradients ``at`` (one of ``AT``) with; otherwise as ``choose``."""

    def refuses(engine: Engine) -> str | None:
        reasons = (engine.refuses_gradients(net, plan, device, dtype, at) for plan in plans)
        return next((reason for reason in reasons if reason), None)

    return _choose(name, refuses, net, size)


_Refuses = Callable[[Engine], str | None]


def _choose(
    name: str, refuses: _Refuses, net: ResidualNetwork, size: tuple[int, ...] | None
) -> tuple[Engine, dict[str, str]]:
    if name != "auto":
        engine = get(name)
        reason = _reason(engine, refuses, net, size)
        if reason:
            raise EngineError(f"the {name} engine cannot run this: {reason}")
        return engine, {}
    passed: dict[str, str] = {}
    for candidate in _REGISTRY:
        if candidate == "reference":
            continue
        engine = get(candidate)
        reason = _reason(engine, refuses, net, size) or engine.unproven
        if reason is None:
            return engine, passed
        passed[candidate] = reason
    raise EngineError("no engine can run this: " + "; ".join(f"{k}: {v}" for k, v in passed.items()))


def _reason(engine: Engine, refuses: _Refuses, net: ResidualNetwork, size: tuple[int, ...] | None) -> str | None:
    reason = engine.missing() or passed_by(net, engine.fused) or refuses(engine)
    if reason is not None or not engine.fused:
        return reason
    if size not in (None, tuple(net.input_shape)):
        return (
            f"images are {size} and the network was wrapped for {tuple(net.input_shape)}; wrap it with such an example"
        )
    return None
