"""resens_fast::eval: one operator, a kernel for CPU and one for CUDA, known to tracing, captured into CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import resens_fast as rf
from resens_fast import extension
from resens_fast.engines.cpu import chosen_isa
from resens_fast.engines.cuda import Program, TapeExecutor, Variant
from resens_fast.engines.cuda_pack import pack
from resens_fast.engines.ops import has_kernel
from resens_fast.engines.packed import packed
from resens_fast.lower import lower

pytestmark = pytest.mark.skipif(
    extension.module() is None, reason=f"the operator needs the extension: {extension.reason()}"
)
needs_cuda = pytest.mark.skipif(not has_kernel("cuda"), reason="resens_fast._C was built without CUDA")


def test_it_is_registered_for_every_device_of_the_build() -> None:
    assert has_kernel("cpu")
    assert has_kernel("cuda") == bool(extension.info()["cuda"])
    assert not has_kernel("xpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("classes", [0, 10])
def test_the_fake_function_knows_the_shapes_on_either_device(device: str, classes: int) -> None:
    with FakeTensorMode():
        images, labels = torch.empty(5, 3, 32, 32, device=device), torch.empty(5, dtype=torch.int64, device=device)
        packed, program = torch.empty(64, dtype=torch.uint8, device=device), [torch.empty(8, 2, device=device)]
        layout = torch.empty(10, dtype=torch.int32)
        counts, logits = torch.ops.resens_fast.eval(images, labels, layout, packed, program, 7, classes, 132, 2)
    assert (counts.shape, counts.dtype, counts.device.type) == ((3, 7), torch.int64, device)
    assert (logits.shape, logits.dtype, logits.device.type) == ((7, 5, 10) if classes else (0,), torch.float32, device)


def test_the_cpu_refuses_what_is_not_for_it() -> None:
    x, none = torch.zeros(1, 3, 32, 32), torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="program is the tape and its gates, not 4 tensors"):
        torch.ops.resens_fast.eval(x, none, none, none, [none] * 4, 1, 10, 1, 1)


def test_the_other_operators_keep_to_their_schemas() -> None:
    """They neither write into what they are given nor return it; their results' sizes depend on values, so none is
    known to tracing (eval, path_gradients and Triton's block are: their tests are beside them).
    """
    net = rf.wrap(rf.models.resnet(8).eval())
    plan = rf.plan(net, rf.sweeps.single(net))
    tape, state = plan.tape(), packed(net)
    instructions, gates = torch.from_numpy(tape.instructions).reshape(-1, 2), torch.from_numpy(tape.gates)
    ops, isa = torch.ops.resens_fast, chosen_isa()
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.cpu_checksum, ([state.raw, state.layout], 2)),
        (ops.cpu_pack, (state.layout, state.raw, isa, False)),
        (ops.cpu_pack_transposed, (state.layout, state.raw, isa)),
        (ops.cpu_schedule, (state.layout, isa, False, instructions, gates, plan.words, 64, 2, 0)),
    ]
    if has_kernel("cuda"):
        blocks = pack(lower(net), torch.bfloat16).blocks
        calls.append((ops.cuda_program, (instructions, gates, blocks, 2, 16, 1)))
    calls += [(ops.cpu_isas, ()), (ops.cpu_multiply_adds, (isa, 1))]
    for op, arguments in calls:
        kinds = ("test_schema", "test_autograd_registration")
        torch.library.opcheck(op.default, arguments, test_utils=kinds)
    # With those that have tests of their own, and one that needs a GPU, they are all there are.
    others = {"eval", "path_gradients", "cuda_variant", "triton_block", "triton_block_backward"}
    every = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("resens_fast::")}
    assert every <= others | {op._qualified_op_name.split("::")[1] for op, _ in calls} | {"cuda_program"}


class Recorder(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_cuda
@pytest.mark.parametrize("width", [16, 32])
def test_enqueue_reads_nothing_back(width: int) -> None:
    """On tensors without data: whatever waited for the device or read a value would raise, and spoil a capture."""
    net = rf.wrap(rf.models.resnet(8, width=width).eval())
    plan = rf.plan(net, rf.sweeps.single(net))
    packed = pack(lower(net), torch.bfloat16)
    executor = TapeExecutor(packed, plan, torch.device("cpu"), Variant(32 // width, 4, 0))
    real = executor.program(6)
    with FakeTensorMode() as mode:
        fake = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in real[:3]]
        executor._programs = dict.fromkeys(
            executor._programs, Program(fake[0], fake[1], fake[2], mode.from_tensor(real.slots), real.cost)
        )
        executor.layout = mode.from_tensor(executor.layout)
        executor.weights = torch.empty(len(executor.weights), dtype=torch.uint8, device="cuda")
        images, labels = torch.empty(6, 3, 32, 32, device="cuda"), torch.empty(6, dtype=torch.int64, device="cuda")
        with Recorder() as ran:
            counts = executor.enqueue(images, labels)
    assert (counts.shape, counts.dtype, counts.device.type) == ((3, plan.words), torch.int64, "cuda")
    assert [name for name in ran.names if name != "prim.device.default"] == [
        "aten.slice.Tensor",
        "resens_fast.eval.default",
    ]


@pytest.mark.parametrize(("width", "preactivation"), [(16, True), (16, False), (32, False)])
def test_the_operands_hold_the_network_where_the_layout_says(width: int, preactivation: bool) -> None:
    net = rf.wrap(rf.models.resnet(8, width=width, preactivation=preactivation).eval())
    parts = pack(lower(net), torch.float16)
    layout, packed = parts.operands(torch.device("cpu"))
    fp16, wide, channels, relu, *head, parameters, stem = layout.tolist()
    assert (fp16, wide, channels, relu, tuple(head)) == (1, width, 3, int(not preactivation), parts.head)
    assert parameters % 16 == stem % 16 == len(packed) % 16 == 0
    assert torch.equal(packed[: len(parts.weights)], parts.weights)
    assert torch.equal(
        packed[parameters : parameters + 4 * len(parts.parameters)].view(torch.float32), parts.parameters
    )
    assert torch.equal(packed[stem : stem + 4 * len(parts.stem)].view(torch.float32), parts.stem)
