"""The C++ kernels below the engine: values against float64, and the same bits however the work is cut."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resens_fast import extension
from resens_fast.engines.cpu_layout import describe
from resens_fast.fused import FusedNetwork, convert
from resens_fast.plan import HEAD, RESTORE, RUN, SAVE, SHORTCUT
from tests import lowered

if extension.module() is None:
    pytest.skip(f"no compiled extension: {extension.reason()}", allow_module_level=True)

OPS = torch.ops.resens_fast
ISAS = tuple(OPS.cpu_isas())
FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
EMPTY = torch.empty(0, dtype=torch.int64)
Letters = list[tuple[int, float]]


class Packed:
    def __init__(self, net: FusedNetwork, isa: str = "", rounded: bool = False) -> None:
        self.net, self.isa, self.rounded = net, isa, rounded
        self.layout, self.raw = describe(net)
        self.packed = OPS.cpu_pack(self.layout, self.raw, isa, rounded)
        self.truth = convert(net, torch.float64)

    def tape(self, words: list[Letters]) -> tuple[torch.Tensor, torch.Tensor]:
        """One word after the other, each from the stem's output: no sharing but the stem."""
        rows: list[tuple[int, int, float]] = [(SAVE, 0, 0.0)]
        for w, letters in enumerate(words):
            rows += [(RESTORE, 0, 0.0)] if w else []
            rows += [(RUN if gate else SHORTCUT, block, gate) for block, gate in letters]
            rows.append((HEAD, w, 0.0))
        return torch.tensor([r[:2] for r in rows], dtype=torch.int32), torch.tensor([r[2] for r in rows])

    def __call__(
        self, x: torch.Tensor, words: list[Letters] | None = None, threads: int = 1, tile: int = 0
    ) -> torch.Tensor:
        """Logits [W, B, K]."""
        words = [[(i, 1.0) for i in range(len(self.net.blocks))]] if words is None else words
        tape, gates = self.tape(words)
        control = torch.zeros(3, dtype=torch.int64)
        return OPS.eval(
            x, EMPTY, self.layout, self.packed, [tape, gates], len(words), self.net.classes, threads, tile,
            self.isa, self.rounded, control,
        )[1]  # fmt: skip

    def expected(self, x: torch.Tensor, word: Letters) -> torch.Tensor:
        state = self.truth.stem(x.double())
        for block, gate in word:
            state = self.truth.blocks[block](state, gate)
        return self.truth.head(state)


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def assert_close(packed: Packed, x: torch.Tensor, out: torch.Tensor, word: Letters) -> None:
    """DESIGN's promise: at most four times torch's own error in the same dtype, with a floor of a few eps.

    Both errors are estimates from these images: few logits make a coin toss of their ratio, so x should hold a dozen.
    """
    expected = packed.expected(x, word)
    net, images = (_rounded(packed.net), x.bfloat16()) if packed.rounded else (packed.net, x)
    torchs = net.forward(images, *zip(*word, strict=True))
    eps = 2.0**-8 if packed.rounded else 2.0**-23
    assert rms(out - expected) <= max(4 * rms(torchs - expected), 4 * eps * rms(expected))


@functools.lru_cache(maxsize=64)
def _rounded(net: FusedNetwork) -> FusedNetwork:
    return convert(net, torch.bfloat16)


@st.composite
def networks(draw: st.DrawFn) -> FusedNetwork:
    widths = tuple(draw(st.lists(st.sampled_from([3, 10, 16, 17, 32, 48, 64, 65]), min_size=1, max_size=3)))
    kind = draw(st.sampled_from(["basic", "bottleneck"]))
    wider = [
        s
        for s in ("projection", "pad", "pad2", "pool")
        if s == "projection" or all(a <= b for a, b in itertools.pairwise(widths))
    ]
    height, width = draw(st.integers(5, 20)), draw(st.integers(5, 20))
    shortcut = draw(st.sampled_from(wider))
    if shortcut == "pool":  # average pooling of stride 2 halves rounding down, a stride rounds up
        height, width = height // 4 * 4 + 4, width // 4 * 4 + 4
    return lowered.network(
        draw(st.integers(0, 2**16)), widths, draw(st.integers(1, 2)), (draw(st.sampled_from([1, 3, 4])), height, width),
        draw(st.sampled_from([2, 10, 17])), kind, draw(st.booleans()), shortcut, imagenet=False,
    )  # fmt: skip


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("isa", ISAS)
@FEW
@given(net=networks(), batch=st.integers(12, 20), data=st.data())
def test_any_network_against_float64(
    isa: str, rounded: bool, net: FusedNetwork, batch: int, data: st.DataObject
) -> None:
    packed = Packed(net, isa, rounded)
    x = torch.randn(batch, *net.input_shape, generator=torch.Generator().manual_seed(batch))
    gates = st.sampled_from([1.0, 1.0, 0.0, 0.5, -1.25, 1e-6])
    words = [[(i, 1.0) for i in range(len(net.blocks))], [(i, data.draw(gates)) for i in range(len(net.blocks))]]
    for word, out in zip(words, packed(x, words), strict=True):
        assert_close(packed, x, out, word)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("widths", "image", "options"),
    [
        ((16, 32, 64), (3, 32, 32), {}),  # the fast paths
        ((16, 32, 64), (3, 32, 32), {"pre": True}),
        ((64, 128), (3, 16, 16), {"kind": "bottleneck"}),
        ((64, 256), (3, 12, 12), {"pre": True, "kind": "bottleneck"}),
        ((128,), (3, 14, 14), {}),  # the path for any width, tiles over the border
        ((16, 16), (3, 2, 2), {}),  # too small for Winograd
        ((16, 16), (1, 1, 1), {}),
        ((16, 32), (3, 64, 48), {"imagenet": True, "classes": 33}),
    ],
)
def test_shapes_against_float64(
    isa: str, rounded: bool, widths: tuple[int, ...], image: tuple[int, int, int], options: dict
) -> None:  # type: ignore[type-arg]
    packed = Packed(lowered.network(1, widths, 2, image, **options), isa, rounded)
    x = torch.randn(12, *image, generator=torch.Generator().manual_seed(0))
    out = packed(x)[0]
    assert_close(packed, x, out, [(i, 1.0) for i in range(len(packed.net.blocks))])


def test_stems_of_several_convolutions() -> None:
    g = torch.Generator().manual_seed(0)
    net = lowered.network(0, (16, 32), image=(3, 16, 16))
    convs = (lowered.conv(g, 3, 8, relu=True), lowered.conv(g, 8, 8, relu=True), lowered.conv(g, 8, 16, relu=True))
    object.__setattr__(net, "stem", type(net.stem)(convs, None))
    for isa in ISAS:
        packed = Packed(net, isa)
        x = torch.randn(12, 3, 16, 16, generator=g)
        assert_close(packed, x, packed(x)[0], [(i, 1.0) for i in range(4)])


def test_wide_kernels_and_no_padding() -> None:
    # 5x5 convolutions read two pixels past the border; a block without padding shrinks the image.
    g = torch.Generator().manual_seed(0)
    net = lowered.network(0, (16,), 1, (3, 9, 11))
    block = net.blocks[0]
    convs = (lowered.conv(g, 16, 16, 5, relu=True), lowered.conv(g, 16, 16, 3))
    object.__setattr__(block, "convs", convs)
    for rounded in (False, True):
        for isa in ISAS:
            packed = Packed(net, isa, rounded)
            x = torch.randn(12, *net.input_shape, generator=g)
            assert_close(packed, x, packed(x)[0], [(0, 1.0)])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "options", [{}, {"pre": True, "kind": "bottleneck", "widths": (32, 48)}, {"widths": (17, 32), "image": (3, 13, 18)}]
)
def test_the_same_bits_in_any_company(isa: str, options: dict) -> None:  # type: ignore[type-arg]
    for rounded in (False, True):
        packed = Packed(lowered.network(3, **options), isa, rounded)
        n = len(packed.net.blocks)
        x = torch.randn(21, *packed.net.input_shape, generator=torch.Generator().manual_seed(0))
        words: list[Letters] = [
            [(i, 1.0) for i in range(n)],
            [(i, 0.0 if i == 1 else 0.7) for i in range(n)],
            [(i, 0.0 if i == 2 else 1.0) for i in range(n)],
        ]
        together = packed(x, words)
        for threads, tile in ((2, 0), (3, 1), (2, 5), (1, 21)):
            assert torch.equal(packed(x, words, threads, tile), together)
        for w, word in enumerate(words):
            assert torch.equal(packed(x[:1], [word], 2)[0], together[w, :1])
            assert torch.equal(packed(x[7:12], [word], 1, 3)[0], together[w, 7:12])


def test_rounded_products_are_the_same_on_every_instruction_set_with_fused_multiply_add() -> None:
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for rounded in (False, True):
        results = [Packed(lowered.network(5), isa, rounded)(x) for isa in ISAS if isa in ("avx512", "avx2")]
        assert all(torch.equal(results[0], r) for r in results)


@pytest.mark.parametrize("isa", ISAS)
def test_nan_stays_with_its_image(isa: str) -> None:
    for rounded in (False, True):
        packed = Packed(lowered.network(2), isa, rounded)
        x = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        clean = packed(x)[0]
        x[1, 0, 3, 4], x[3, 2, 31, 31] = float("nan"), float("inf")
        x[4, 1, 0, 0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(
            torch.float32
        )  # rounds to zero if it is not looked at
        out = packed(x)[0]
        assert not torch.isfinite(out[[1, 3, 4]]).any()
        assert torch.equal(out[[0, 2]], clean[[0, 2]])
        assert torch.equal(packed(torch.where(torch.isfinite(x), x, 0.0))[0][0], clean[0])


def test_one_call_counts_as_the_torch_engine_does() -> None:
    from resens_fast.engines.base import count

    packed = Packed(lowered.network(4))
    x = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x[2, 0, 0, 0] = float("inf")
    labels = torch.arange(9) % 10
    words: list[Letters] = [[(i, 1.0) for i in range(6)], [(i, 0.3) for i in range(6)]]
    tape, gates = packed.tape(words)
    control = torch.zeros(3, dtype=torch.int64)
    for threads in (1, 2):
        counts, logits = OPS.eval(
            x,
            labels,
            packed.layout,
            packed.packed,
            [tape, gates],
            2,
            packed.net.classes,
            threads,
            4,
            "",
            False,
            control,
        )
        for w in range(2):
            expected = count(logits[w], labels)
            assert counts[0, w] == expected[0]
            assert counts[2, w] == expected[2] == 1
            assert abs(counts[1, w] - expected[1]) <= 9  # the two libraries' exp and log differ in a last bit


def test_cancelled_before_it_starts() -> None:
    packed = Packed(lowered.network(4))
    tape, gates = packed.tape([[(i, 1.0) for i in range(6)]])
    control = torch.tensor([1, 0, 0])
    x = torch.randn(4, 3, 32, 32)
    counts, _ = OPS.eval(
        x,
        torch.zeros(4, dtype=torch.int64),
        packed.layout,
        packed.packed,
        [tape, gates],
        1,
        0,
        2,
        0,
        "",
        False,
        control,
    )
    assert counts.sum() == 0
    assert control[1] == 0
    assert control[2] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(images=torch.zeros(2, 3, 16, 16)), "images must be"),
        (lambda a: a.update(images=torch.zeros(2, 3, 32, 32).to(memory_format=torch.channels_last)), "contiguous"),
        (lambda a: a.update(labels=torch.tensor([0, 10])), "Label 10 of image 1"),
        (lambda a: a.update(labels=torch.tensor([0])), "1 labels for 2 images"),
        (lambda a: a.update(program=[torch.tensor([[RUN, 9]], dtype=torch.int32), torch.ones(1)]), "block 9 of 6"),
        (lambda a: a.update(program=[torch.tensor([[RUN, 3]], dtype=torch.int32), torch.ones(1)]), "another shape"),
        (
            lambda a: a.update(program=[torch.tensor([[RESTORE, 0]], dtype=torch.int32), torch.ones(1)]),
            "before it is saved",
        ),
        (lambda a: a.update(program=[torch.tensor([[HEAD, 1]], dtype=torch.int32), torch.ones(1)]), "word 1 of 1"),
        (lambda a: a.update(isa="sse9"), "RESENS_FAST_ISA"),
        (lambda a: a.update(layout=torch.tensor([7], dtype=torch.int32)), "another version"),
    ],
)
def test_wrong_arguments_are_named(change, message: str) -> None:  # type: ignore[no-untyped-def]
    packed = Packed(lowered.network(4))
    tape, gates = packed.tape([[(i, 1.0) for i in range(6)]])
    arguments = {
        "images": torch.zeros(2, 3, 32, 32), "labels": torch.zeros(2, dtype=torch.int64), "layout": packed.layout, "packed": packed.packed,  # noqa: E501
        "isa": "", "rounded": False, "program": [tape, gates], "words": 1, "threads": 1, "tile": 0, "logits": 0,
        "control": torch.zeros(3, dtype=torch.int64),
    }  # fmt: skip
    change(arguments)
    with pytest.raises(ValueError, match=message):
        OPS.eval(**arguments)
