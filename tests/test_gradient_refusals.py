"""Gradients that cannot be: one sentence that names what was wrong."""

from __future__ import annotations

import pytest
import torch

import resens_fast as rf
from resens_fast import sweeps
from resens_fast.errors import DataError, EngineError, SweepError, WrapError
from tests.conftest import small_resnet
from tests.test_gradients import NETS, batch


def test_what_cannot_be_is_refused_in_one_sentence() -> None:
    net, (images, labels) = NETS[True], batch()
    images, paths = images.float(), sweeps.paths(NETS[True], [1])
    other = rf.wrap(small_resnet(depth=20), torch.zeros(1, 3, 16, 16))
    with pytest.raises(EngineError, match="first_block, image, parameters, not at 'middle'"):
        rf.path_gradients(net, (images, labels), norm="middle", progress=False)
    with pytest.raises(EngineError, match="parameters have norms only"):
        rf.input_gradients(net, paths, images, labels, at="parameters")
    with pytest.raises(EngineError, match="float64 only"):
        rf.input_gradients(net, paths, images, labels, engine="reference", dtype=torch.float32)
    with pytest.raises(EngineError, match="must be a torch.dtype"):
        rf.gate_gradients(net, paths, (images, labels), dtype="float32", progress=False)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="16 bits or more"):
        rf.gate_gradients(net, paths, (images, labels), dtype=torch.int8, progress=False)
    for call in (rf.input_gradients, rf.gate_gradients):
        data = (images, labels) if call is rf.input_gradients else ((images, labels),)
        with pytest.raises(SweepError, match="of a network with 9 blocks"):
            call(net, sweeps.paths(other, [1]), *data)  # type: ignore[operator]
        with pytest.raises(SweepError, match="a sweep is needed, not list"):
            call(net, [1], *data)  # type: ignore[operator]
        with pytest.raises(WrapError, match="not ResNet"):
            call(net.model, paths, *data)  # type: ignore[operator]
    with pytest.raises(WrapError, match="not ResNet"):
        rf.path_gradients(net.model, (images, labels))  # type: ignore[arg-type]
    with pytest.raises(SweepError, match="no path of length 7: 6 blocks"):
        rf.path_gradients(net, (images, labels), lengths=[1, 7], progress=False)
    with pytest.raises(SweepError, match="lengths is empty"):
        rf.path_gradients(net, (images, labels), lengths=[], progress=False)
    with pytest.raises(SweepError, match="either lengths or paths"):
        rf.path_gradients(net, (images, labels), lengths=[1], paths=paths, progress=False)
    with pytest.raises(SweepError, match="batch must be a whole number of at least 1, not 0"):
        rf.path_gradients(net, (images, labels), batch=0, progress=False)
    with pytest.raises(DataError, match="label 9"):
        rf.input_gradients(net, paths, images, torch.tensor([0, 9, 0]))
    with pytest.raises(DataError, match="empty"):
        rf.input_gradients(net, paths, images[:0], labels[:0])
    with pytest.raises(SweepError, match="path 1 runs the blocks in another order than path 0"):
        rf.gradient_plan(net, sweeps.from_orders(net, [[0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5]]))


def test_hooks_that_gates_would_pass_by_are_refused() -> None:
    net, (images, labels) = rf.wrap(small_resnet(), torch.zeros(1, 3, 16, 16)), batch()
    handle = net.model.blocks[1].register_forward_hook(lambda *_: None)  # type: ignore[union-attr, index]
    with pytest.raises(EngineError, match=r"'blocks\.1' has a forward hook, which no variant"):
        rf.gate_gradients(net, sweeps.intact(net), (images.float(), labels), progress=False)
    handle.remove()
    rf.gate_gradients(net, sweeps.intact(net), (images.float(), labels), progress=False)


@pytest.mark.skipif(rf.extension.module() is None, reason=f"no compiled extension: {rf.extension.reason()}")
def test_auto_takes_an_engine_that_has_the_dtype_and_the_gradient() -> None:
    def taken(net: rf.ResidualNetwork, dtype: torch.dtype, at: str, size: tuple[int, ...] | None = None) -> str:
        plans = [rf.gradient_plan(net, sweeps.intact(net))]
        return rf.engines.choose_for_gradients("auto", net, plans, torch.device("cpu"), dtype, at, size)[0].name

    residual, highway = rf.wrap(rf.models.resnet(8).eval()), rf.wrap(rf.models.highway(8).eval())
    assert taken(residual, torch.float32, "first_block") == "cpu"
    assert taken(residual, torch.float32, "first_block", (3, 40, 40)) == "torch"
    assert taken(highway, torch.float32, "first_block") == "torch"
    for at in rf.engines.AT:
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            assert taken(residual, dtype, at) == "torch"
        assert (taken(residual, torch.float32, at) == "cpu") == (at == "first_block")
    study = rf.path_gradients(residual, (torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64)), [1], samples=2,
                              norm="image", progress=False)  # fmt: skip
    assert "at first_block, not at image" in study.manifest["engine"]["passed_over"]["cpu"]


def test_a_parameter_of_two_blocks_is_refused_block_by_block() -> None:
    model = small_resnet()
    model.blocks[1].conv1.weight = model.blocks[0].conv1.weight  # type: ignore[union-attr, index]
    net, (images, labels) = rf.wrap(model, torch.zeros(1, 3, 16, 16)), batch()
    with pytest.raises(EngineError, match="blocks 0 and 1 share a parameter"):
        rf.path_gradients(net, (images.float(), labels), [1], norm="parameters", progress=False)
    assert len(rf.path_gradients(net, (images.float(), labels), [1], progress=False).frame) == 6
