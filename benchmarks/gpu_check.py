"""Builds, checks and times the CUDA engine on the GPU at hand, in under ten minutes.

    python benchmarks/gpu_check.py --out DIR [--data FILE.npz] [--seconds 560]

Works from a source tree with torch >= 2.11 and numpy. Every section is on its own: one that fails or finds something
missing is reported, and the next one runs. FILE.npz holds `images` uint8 [N, H, W, C] or float32 [N, C, 32, 32] and
`labels` [N]. Ends with one table and DIR/gpu_check.json; commit that under benchmarks/results/ with the device's name.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import gpu_peers, roofline  # noqa: E402
from benchmarks.gpu_values import (  # noqa: E402
    Missing,
    check_graph,
    check_operators,
    check_values,
    executor_for,
    load_data,
    need_gpu,
    network,
    sanitizer,
    tiny,
)  # fmt: skip

FLOPS_PER_BLOCK = 2 * 2 * 9 * 16 * 16 * 1024  # the same in every stage


class Check:
    """The run: time left, rows of the table, everything for the JSON."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.began = time.perf_counter()
        self.result: dict[str, Any] = {"sections": {}, "rows": []}
        self.peak = 0.0
        self.peers: dict[str, float] = {}

    def left(self) -> float:
        return self.arguments.seconds - (time.perf_counter() - self.began)

    def section(self, name: str, run: Callable[[], Any], needs: float) -> None:
        """Runs one section when `needs` seconds are left; never raises."""
        began = time.perf_counter()
        entry: dict[str, Any] = {}
        try:
            if self.left() < needs:
                raise Missing(f"needs {needs:.0f} s, {max(0.0, self.left()):.0f} s are left")
            entry = {"state": "ok", "value": run()}
        except Missing as reason:
            entry = {"state": "missing", "reason": str(reason)}
        except Exception as error:
            entry = {"state": "failed", "reason": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        entry["seconds"] = round(time.perf_counter() - began, 2)
        self.result["sections"][name] = entry
        print(f"[{entry['seconds']:7.1f} s] {name}: {entry.get('reason', entry.get('value'))}", flush=True)
        self.save()

    def save(self) -> None:
        folder = Path(self.arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu_check.json").write_text(json.dumps(self.result, indent=1, default=str) + "\n")

    def row(self, name: str, ours: float, unit: str, work: float, estimate: float | None = None, **peers: float) -> str:
        """`ours` in images (times configurations) per second; work: FLOP per unit."""
        share = ours * work / self.peak if self.peak else float("nan")
        self.result["rows"].append(
            {"name": name, "ours": ours, "unit": unit, "of_peak": share, "model": estimate, **peers}
        )
        return f"{ours:,.0f} {unit}"


def environment() -> dict[str, Any]:
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    found["commit"] = commit.stdout.strip() or "unknown"
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found |= {"device": p.name, "capability": [p.major, p.minor], "multiprocessors": p.multi_processor_count}
        if shutil.which("nvidia-smi"):
            query = [
                "nvidia-smi",
                "--query-gpu=driver_version,clocks.max.sm,power.limit",
                "--format=csv,noheader",
                "-i",
                "0",
            ]
            found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def build() -> str:
    from resens_fast import extension

    need_gpu()
    if extension.reason() is None and extension.info().get("cuda") and not os.environ.get("RESENS_REBUILD"):
        return "already built"
    major, minor = torch.cuda.get_device_capability()
    env = {**os.environ, "RESENS_FAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-2000:])
    extension._load.cache_clear()
    if extension.reason():
        raise RuntimeError(extension.reason())
    return done.stdout.strip().splitlines()[-1]


def triton_values(dtype: torch.dtype) -> dict[str, float]:
    need_gpu()
    from resens_fast.kernels import check as kernels

    return kernels.values(dtype)


def triton_gradients(dtype: torch.dtype) -> dict[str, float]:
    need_gpu()
    from resens_fast.kernels import check as kernels

    return kernels.gradients(dtype)


def triton_masked() -> float:
    need_gpu()
    from resens_fast.kernels import check as kernels

    return kernels.masked()


def timings(check: Check) -> None:
    """The rows of the table."""
    import resens_fast as rf

    dtype = torch.bfloat16
    device = torch.cuda.get_device_name().lower().replace(" ", "") if torch.cuda.is_available() else ""
    card = next((c for k, c in roofline.CARDS.items() if k in device), None)

    def data() -> tuple[torch.Tensor, torch.Tensor]:
        x, labels, check.result["data"] = load_data(check.arguments.data)
        return x, labels

    def timed(name: str, draw: Callable[[Any], Any], count: int, most: float) -> str:
        need_gpu()
        net = network(110)
        sweep = draw(net)
        x, labels = data()
        x, labels = x[:count], labels[:count]
        plan = rf.plan(net, sweep)
        run = executor_for(net, plan, dtype)
        run.tally(x[:64], labels[:64])  # warm up
        began = time.perf_counter()
        done = 0
        for start in range(0, count, run.batch):
            run.tally(x[start : start + run.batch], labels[start : start + run.batch])
            done = min(count, start + run.batch)
            if time.perf_counter() - began > most:
                break
        torch.cuda.synchronize()
        spent = time.perf_counter() - began
        rate = done * len(sweep) / spent
        estimate = None
        if card is not None:
            rows = plan.tape().instructions.tolist()
            stages = [s - 1 for s in net.structure.stages]
            total = roofline.tape_seconds(card, rows, stages, list(net.structure.transitions), done, "phased")
            estimate = done * len(sweep) / total
        # A peer really skips deleted blocks, but shares nothing: its intact rate times blocks / blocks it runs.
        asked = plan.requested_runs / max(1, len(sweep) * len(net.blocks))
        peers = {p: rate / (r / asked) for p, r in check.peers.items() if r}
        work = FLOPS_PER_BLOCK * plan.executed_runs / max(1, len(sweep))
        text = check.row(name, rate, "images x configurations/s", work, estimate, **peers)
        extrapolated = "" if done == count else f", timed {done} of {count} images"
        return f"{text}, {spent:.2f} s for {done * len(sweep):,}{extrapolated}"

    def peers() -> dict[str, Any]:
        need_gpu()
        found = {}
        for peer in gpu_peers.PEERS:
            if check.left() < 90:
                found[peer] = "no time left"
                continue
            model = network(110).model
            row = gpu_peers.peer_rate(
                model, (3, 32, 32), peer, dtype, (256, 1024, 4096) if peer == "eager" else (1024, 4096)
            )
            check.peers[peer] = row["images_per_second"]
            found[peer] = row
        return found

    def peak() -> str:
        need_gpu()
        check.peak = gpu_peers.dense_peak(dtype)
        return f"{check.peak / 1e12:.0f} TFLOP/s"

    rows: list[tuple[str, Callable[[Any], Any], int, float]] = [
        ("intact", rf.sweeps.intact, 10_000, 10),
        ("all single deletions", rf.sweeps.single, 10_000, 10),
        ("delete 10 of 54, 10,000 draws", lambda net: rf.sweeps.delete_random(net, k=10, samples=10_000), 10_000, 75),
        ("swap 10 pairs, 100 draws", lambda net: rf.sweeps.swap_random(net, k=10, samples=100), 10_000, 10),
        ("batch of 8, 1,000 x delete 10", lambda net: rf.sweeps.delete_random(net, k=10, samples=1000), 8, 10),
    ]

    def large() -> str:
        need_gpu()
        try:
            from torchvision.models import resnet50
        except ImportError:
            raise Missing("torchvision is not installed") from None
        from resens_fast.engines.levels import LevelsExecutor

        net = rf.wrap(resnet50(weights=None).eval(), torch.zeros(1, 3, 224, 224))
        run = LevelsExecutor(net, rf.plan(net, rf.sweeps.single(net)), torch.device("cuda", 0), dtype, batch=64)
        x, labels = torch.randn(128, 3, 224, 224), torch.zeros(128, dtype=torch.int64)
        spent = gpu_peers.seconds(lambda: run.tally(x, labels), 1.0)
        rate = len(x) * len(net.blocks) / spent
        eager = gpu_peers.peer_rate(net.model, (3, 224, 224), "eager", dtype, (64, 128))["images_per_second"]
        return check.row(
            "resnet50 at 224, single deletions (levels)", rate, "images x configurations/s", 8.2e9, eager=rate / eager
        )

    check.section("dense bf16 peak", peak, 20)
    check.section("peers, intact", peers, 120)
    for name, sweep, count, most in rows:
        check.section(name, lambda n=name, s=sweep, c=count, m=most: timed(n, s, c, m), most + 10)  # type: ignore[misc]
    def triton(name: str, draw: Callable[[Any], Any]) -> str:
        need_gpu()
        from resens_fast.kernels import check as kernels

        net = network(110)
        sweep = draw(net)
        found = kernels.rate(net, sweep, dtype, 10_000)
        work = FLOPS_PER_BLOCK * found["runs"] / max(1, len(sweep))
        return check.row(f"{name} (triton)", found["rate"], "images x configurations/s", work)

    check.section("resnet50", large, 40)
    for name, sweep, _, _ in rows[:2]:
        check.section(f"{name} (triton)", lambda n=name, s=sweep: triton(n, s), 60)  # type: ignore[misc]

    def paths() -> str:
        need_gpu()
        from resens_fast.kernels import check as kernels

        net = network(110)
        drawn = rf.sweeps.paths(net, range(1, 55), samples=4, seed=0)
        found = kernels.path_rate(net, drawn, dtype)
        work = FLOPS_PER_BLOCK * found["runs"] / len(drawn)
        return check.row("gradients along 216 paths (triton)", found["rate"], "images x paths/s", work)

    check.section("path gradients (triton)", paths, 60)


def table(check: Check) -> str:
    lines = [
        f"{'':<44}{'per second':>14}"
        + "".join(f"{'x ' + p:>12}" for p in gpu_peers.PEERS)
        + f"{'of peak':>10}{'model':>14}"
    ]
    for row in check.result["rows"]:
        peers = "".join(f"{row[p]:>12.1f}" if p in row else f"{'-':>12}" for p in gpu_peers.PEERS)
        model = f"{row['model']:>14,.0f}" if row.get("model") else f"{'-':>14}"
        lines.append(f"{row['name']:<44}{row['ours']:>14,.0f}{peers}{row['of_peak']:>10.0%}{model}")
    bad = {k: v["reason"] for k, v in check.result["sections"].items() if v["state"] != "ok"}
    return "\n".join(lines + [f"not done: {k}: {v.splitlines()[0] if v else ''}" for k, v in bad.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--data")
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--only-tiny", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only_tiny:
        tiny()
        return
    check = Check(arguments)
    check.section("environment", environment, 0)
    check.section("build", build, 60)
    for images in (2, 1):
        for dtype in (torch.bfloat16, torch.float16):
            name = f"values, {images} image(s) per CTA, {str(dtype).removeprefix('torch.')}"
            check.section(name, lambda i=images, d=dtype: check_values(i, d), 20)  # type: ignore[misc]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = f"triton values, {str(dtype).removeprefix('torch.')}"
        check.section(name, lambda d=dtype: triton_values(d), 60)  # type: ignore[misc]
    for dtype in (torch.bfloat16, torch.float32):
        name = f"triton path gradients, {str(dtype).removeprefix('torch.')}"
        check.section(name, lambda d=dtype: triton_gradients(d), 60)  # type: ignore[misc]
    check.section("triton masked gradients", triton_masked, 30)
    check.section("CUDA graph", check_graph, 10)
    check.section("operators", check_operators, 20)
    for tool in ("memcheck", "racecheck"):
        check.section(f"compute-sanitizer {tool}", lambda t=tool: sanitizer(t), 120)  # type: ignore[misc]
    timings(check)
    check.result["table"] = table(check)
    check.save()
    print("\n" + check.result["table"])


if __name__ == "__main__":
    main()
