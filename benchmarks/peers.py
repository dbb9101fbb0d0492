"""The peers of the CPU engine: each runs a sweep on images and returns logits [C, B, K] for the configurations it ran.

eager     the Python loop a researcher writes: deleted blocks skipped, inference_mode, channels_last
compile   torch.compile with freezing: the whole model for the intact network, block by block for sweeps
planned   the torch engine of this package: the same plan, so what is left is what the kernels gain
ours      the cpu engine
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

import resens_fast as rf

Run = Callable[[torch.Tensor], torch.Tensor]


def _letters(net: rf.ResidualNetwork, configuration: rf.Configuration) -> list[int]:
    return [j for j in configuration.order if configuration.gates[j] != 0.0 or net.blocks[j].is_transition]


def _loop(
    net: rf.ResidualNetwork,
    blocks: list[Callable[[torch.Tensor], torch.Tensor]],
    sweep: Sequence[rf.Configuration],
    dtype: torch.dtype,
) -> Run:
    @torch.inference_mode()
    def run(x: torch.Tensor) -> torch.Tensor:
        x = x.to(dtype, memory_format=torch.channels_last)
        rows = []
        for configuration in sweep:
            state = net.stem(x)
            for j in _letters(net, configuration):
                deleted = configuration.gates[j] == 0.0
                state = net.blocks[j].skip(state) if deleted else blocks[j](state)
            rows.append(net.head(state).float())
        return torch.stack(rows)

    return run


def _twin(net: rf.ResidualNetwork, dtype: torch.dtype) -> rf.ResidualNetwork:
    import copy

    return copy.deepcopy(net).to(dtype=dtype, memory_format=torch.channels_last).eval()  # type: ignore[no-any-return]


def eager(net: rf.ResidualNetwork, sweep: Sequence[rf.Configuration], dtype: torch.dtype) -> Run:
    twin = _twin(net, dtype)
    return _loop(twin, [twin.model.get_submodule(b.name) for b in twin.blocks], sweep, dtype)


def eager_intact(net: rf.ResidualNetwork, sweep: Sequence[rf.Configuration], dtype: torch.dtype) -> Run:
    model = _twin(net, dtype).model
    return torch.inference_mode()(lambda x: model(x.to(dtype, memory_format=torch.channels_last)).float()[None])


def autocast_intact(net: rf.ResidualNetwork, sweep: Sequence[rf.Configuration], dtype: torch.dtype) -> Run:
    model = _twin(net, torch.float32).model

    @torch.inference_mode()
    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype):
            return model(x.to(memory_format=torch.channels_last)).float()[None]  # type: ignore[no-any-return]

    return run


def compiled(module: nn.Module) -> nn.Module:
    """torch.compile with the parameters frozen, which it does where no gradient can be asked for."""
    import torch._dynamo
    import torch._inductor.config

    torch._inductor.config.freezing = True
    # At the default limit of 8 the peer would silently turn eager.
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.accumulated_recompile_limit = 10000
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(module, dynamic=False)  # type: ignore[no-any-return]


def compile(net: rf.ResidualNetwork, sweep: Sequence[rf.Configuration], dtype: torch.dtype) -> Run:
    twin = _twin(net, dtype)
    return _loop(twin, [compiled(twin.model.get_submodule(b.name)) for b in twin.blocks], sweep, dtype)


def compile_intact(net: rf.ResidualNetwork, sweep: Sequence[rf.Configuration], dtype: torch.dtype) -> Run:
    model = compiled(_twin(net, dtype).model)
    return torch.inference_mode()(lambda x: model(x.to(dtype, memory_format=torch.channels_last)).float()[None])


def _engine(name: str) -> Callable[[rf.ResidualNetwork, rf.Sweep, torch.dtype], Run]:
    def make(net: rf.ResidualNetwork, sweep: rf.Sweep, dtype: torch.dtype) -> Run:
        plan = rf.plan(net, sweep)
        executor = rf.engines.get(name).prepare(net, plan, torch.device("cpu"), dtype)
        word_of = torch.from_numpy(plan.word_of)
        return lambda x: torch.cat([executor.logits(c) for c in x.split(executor.batch)], dim=1).float()[word_of]

    return make


ours, planned = _engine("cpu"), _engine("torch")
