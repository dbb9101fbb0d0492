"""Drives the host harness (csrc/testing) from Python: builds it once per source, runs plans and stems on it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FAILURES = ("races", "uninitialised", "out_of_range", "misaligned", "deadlocks")
COUNTS = ("mma", "ldmatrix", "lds128", "sts32", "cp_async", "barriers", "shuffles")
SAVE, RESTORE, RUN, SHORTCUT, HEAD = range(5)
KERNEL_SAVE, KERNEL_HEAD, KERNEL_END = 1, 6, 7


def cache_folder() -> Path:
    """Builds are kept by the hash of their sources, so that only a change of a kernel costs time again."""
    default = Path(tempfile.gettempdir()) / f"resens_fast-test-cache-{os.getuid()}"
    folder = Path(os.environ.get("RESENS_TEST_CACHE", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sources_hash(folder: Path, *more: str) -> str:
    digest = hashlib.sha256("\n".join(more).encode())
    for path in sorted([*folder.glob("cuda/*"), *folder.glob("testing/*")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]


def build(csrc: Path = CSRC, *options: str) -> Path:
    """The harness as a shared library; options go to the compiler."""
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-std=c++17", "-shared", "-fPIC", *(options or ("-O2", "-march=native"))]
    library = cache_folder() / f"host-{sources_hash(csrc, *command)}.so"
    if not library.exists():
        draft = library.with_suffix(f".{os.getpid()}")
        files = [str(csrc / "testing" / "host.cpp"), str(csrc / "cuda" / "program.cpp"), "-o", str(draft)]
        subprocess.run([*command, *files], check=True, capture_output=True, text=True)
        draft.replace(library)
    return library


def mutated(name: str, file: str, old: str, new: str) -> Path:
    """A copy of csrc with one replacement in csrc/cuda/`file`, built for the two-image bf16 variant only."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "csrc"
        for room in ("cuda", "testing"):
            shutil.copytree(CSRC / room, copy / room)
        path = copy / "cuda" / file
        text = path.read_text()
        assert old in text, f"{name}: {file} has no {old!r} any more; bring the mutation up to date"
        path.write_text(text.replace(old, new, 1))
        return build(copy, "-O1", "-march=native", "-DRF_ONLY_TWO_IMAGES_BF16")


@dataclass
class Program:
    tape: np.ndarray
    chunks: np.ndarray
    parts: np.ndarray
    cost: np.ndarray
    slots: int


@dataclass
class Result:
    tally: np.ndarray  # [words, 3]
    logits: np.ndarray  # [words, images, classes]
    slots: np.ndarray
    failures: dict[str, int]
    counts: dict[str, int]


def _pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if array is None else array.ctypes.data)


def _aligned(values: np.ndarray) -> np.ndarray:
    """A copy at a 64-byte boundary, as a GPU's allocator gives."""
    raw = np.empty(values.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    copy = raw[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


class Host:
    """One build of the harness."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.rf_error.restype = ctypes.c_char_p

    def program(self, packed, tape, gates, images: int, parts: int = 1) -> Program:
        tape = np.ascontiguousarray(tape, np.int32)
        gates = np.ascontiguousarray(gates, np.float32)
        blocks = np.ascontiguousarray(packed.blocks.numpy())
        sizes = np.zeros(4, np.int64)
        bad = self.library.rf_build(
            _pointer(tape),
            _pointer(gates),
            ctypes.c_int64(len(tape)),
            _pointer(blocks),
            len(blocks),
            images,
            packed.width,
            parts,
            _pointer(sizes),
        )
        if bad:
            raise ValueError(self.library.rf_error().decode())
        out = Program(
            *(_aligned(np.zeros((n, w), np.int32)) for n, w in zip(sizes[:3], (4, 2, 2), strict=True)),
            np.zeros(sizes[2]),
            int(sizes[3]),
        )
        self.library.rf_copy(_pointer(out.tape), _pointer(out.chunks), _pointer(out.parts), _pointer(out.cost))
        return out

    def stem(self, packed, images: torch.Tensor, multiple: int) -> tuple[np.ndarray, dict[str, int]]:
        n = len(images)
        padded = -(-n // multiple) * multiple
        x, p = _aligned(images.contiguous().numpy()), _aligned(packed.stem.numpy())
        states = _aligned(np.full((padded, 32, 32, packed.width), np.nan, np.float32))
        report, sizes = np.zeros(12, np.int64), np.array([x.nbytes, p.nbytes, states.nbytes], np.int64)
        self.library.rf_stem(
            _pointer(x),
            _pointer(p),
            _pointer(states),
            _pointer(sizes),
            n,
            padded,
            packed.in_channels,
            packed.width,
            int(packed.stem_relu),
            _pointer(report),
        )
        return states, dict(zip(FAILURES, report[:5].tolist(), strict=True))

    def run(
        self,
        packed,
        program: Program,
        states,
        labels,
        words: int,
        images: int,
        ctas: int = 1,
        stride: int = 1,
        count: int | None = None,
    ) -> Result:
        """`states` [n, 32, 32, width]; `count`: images that are real, when the last tile is padded."""
        states = _aligned(np.ascontiguousarray(states, np.float32))
        count = len(states) if count is None else count
        at, scaled, relu, classes = packed.head
        tally = _aligned(np.zeros((words, 3), np.int64))
        logits = _aligned(np.full((words, count, classes), np.nan, np.float32))
        floats = self.library.rf_slot_floats(images, packed.width)
        slots = _aligned(np.full((ctas, max(1, program.slots), floats), np.nan, np.float32))
        constants = _aligned(packed.weights.numpy()), _aligned(packed.parameters.numpy())
        arrays = [
            program.tape, program.chunks, program.parts, *constants,
            states, _aligned(np.asarray(labels, np.int32)), slots, tally, logits,
        ]  # fmt: skip
        pointers = (ctypes.c_void_p * 10)(*(a.ctypes.data for a in arrays))
        sizes = np.array([a.nbytes for a in arrays], np.int64)
        numbers = np.array(
            [len(program.parts), len(states) // images, count, max(1, program.slots), classes, at, scaled, relu],
            np.int32,
        )
        report = np.zeros(12, np.int64)
        fp16 = int(packed.dtype == torch.float16)
        self.library.rf_run(
            fp16, images, packed.width, ctas, stride, pointers, _pointer(sizes), _pointer(numbers), _pointer(report)
        )
        names = (
            dict(zip(FAILURES, report[:5].tolist(), strict=True)),
            dict(zip(COUNTS, report[5:].tolist(), strict=True)),
        )
        return Result(tally, logits, slots, *names)

    def trace(self, packed, program: Program, states, images: int, **more) -> tuple[list[np.ndarray], Result]:
        """The state [images, C, H, W] after every instruction of a tape without a branch: a SAVE is put behind each."""
        assert program.slots == 0
        assert len(program.parts) == 1
        rows, stages = [], []
        for row in program.tape:
            code = int(row[0])
            if code & 255 in (KERNEL_HEAD, KERNEL_END):
                continue
            rows += [row, np.array([KERNEL_SAVE | code & 0xFF00, len(stages), 0, 0], np.int32)]
            stages.append(code >> 8 & 255)
        tape = _aligned(np.stack([*rows, np.array([KERNEL_END, 0, 0, 0], np.int32)]))
        changed = Program(tape, program.chunks, program.parts, program.cost, len(stages))
        result = self.run(packed, changed, states, np.zeros(len(states)), 1, images, **more)
        out = []
        for slot, stage in enumerate(stages):
            out.append(np.zeros((images, packed.width << stage, 32 >> stage, 32 >> stage), np.float32))
            self.library.rf_read_slot(images, packed.width, stage, _pointer(result.slots[0, slot]), _pointer(out[-1]))
        return out, result
