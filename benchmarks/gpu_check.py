"""Builds, checks and times the CUDA and Triton engines on the GPU at hand, in under ten minutes.

    python benchmarks/gpu_check.py --out DIR [--data FILE.npz] [--seconds 560]

Works from a source tree with torch >= 2.11 and numpy. Every section is on its own: one that fails or finds something
missing is reported, and the next one runs; values are checked in processes of their own, and when the time is over in
the midst of a section the script says which one, writes what it has and ends. FILE.npz holds `images` uint8
[N, H, W, C] or float32 [N, C, 32, 32] and `labels` [N]. Ends with one table and DIR/gpu_check.json; commit that under
benchmarks/results/ with the device's name.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
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
    ALONE,
    Missing,
    alone,
    answer,
    executor_for,
    load_data,
    need_gpu,
    network,
    sanitizer,
)  # fmt: skip

FLOPS_PER_BLOCK = 2 * 2 * 9 * 16 * 16 * 1024  # the same in every stage


class Check:
    """The run: time left, rows of the table, everything for the JSON."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        Path(arguments.out).mkdir(parents=True, exist_ok=True)
        self.began = time.perf_counter()
        self.result: dict[str, Any] = {"sections": {}, "rows": []}
        self.peak = 0.0
        self.peers: dict[str, float] = {}
        self.now = ""
        self.watchdog = threading.Timer(arguments.seconds + 20, self.give_up)
        self.watchdog.daemon = True
        self.watchdog.start()

    def give_up(self) -> None:
        """The time is over and a section still runs: a kernel that hangs cannot be interrupted from this process."""
        self.result["sections"][self.now] = {"state": "failed", "reason": "it did not end in time"}
        self.finish()
        os._exit(3)

    def finish(self) -> None:
        self.watchdog.cancel()
        self.result["table"] = table(self)
        self.save()
        print("\n" + self.result["table"], flush=True)

    def left(self) -> float:
        return self.arguments.seconds - (time.perf_counter() - self.began)

    def section(self, name: str, run: Callable[[], Any], needs: float) -> None:
        """Runs one section when `needs` seconds are left; never raises."""
        began = time.perf_counter()
        entry: dict[str, Any] = {}
        self.now = name
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
        draft = folder / "gpu_check.json.new"
        draft.write_text(json.dumps(self.result, indent=1, default=str) + "\n")
        draft.replace(folder / "gpu_check.json")

    def row(self, name: str, ours: float, unit: str, work: float, **more: Any) -> str:
        """`ours` in images (times configurations) per second; work: FLOP per unit."""
        share = ours * work / self.peak if self.peak else None
        self.result["rows"].append({"name": name, "ours": ours, "unit": unit, "of_peak": share, **more})
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
    return (done.stdout.strip().splitlines() or ["built"])[-1]


def timings(check: Check) -> None:
    """The rows of the table."""
    import resens_fast as rf

    dtype = torch.bfloat16
    device = torch.cuda.get_device_name().lower().replace(" ", "") if torch.cuda.is_available() else ""
    card = next((c for k, c in roofline.CARDS.items() if k in device), None)

    def data() -> tuple[torch.Tensor, torch.Tensor]:
        x, labels, check.result["data"] = load_data(check.arguments.data)
        return x, labels

    def timed(
        name: str, draw: Callable[[Any], Any], count: int, most: float, dtype: torch.dtype = torch.bfloat16
    ) -> str:
        need_gpu()
        net = network(110)
        sweep = draw(net)
        x, labels = data()
        x, labels = x[:count], labels[:count]
        count = len(x)
        plan = rf.plan(net, sweep)
        run = executor_for(net, plan, dtype)
        run.tally(x[:64], labels[:64])  # warm up
        torch.cuda.synchronize()
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
        model = None
        if card is not None:
            rows = plan.tape().instructions.tolist()
            stages = [s - 1 for s in net.structure.stages]
            model = {
                figure: done * len(sweep) / roofline.tape_seconds(
                    card, rows, stages, list(net.structure.transitions), done, figure
                )
                for figure in roofline.FIGURES
            }  # fmt: skip
        # A peer really skips deleted blocks, but shares nothing: its intact rate times blocks / blocks it runs.
        asked = plan.requested_runs / max(1, len(sweep) * len(net.blocks))
        work = FLOPS_PER_BLOCK * plan.executed_runs / max(1, len(sweep))
        text = check.row(name, rate, "images x configurations/s", work, model=model, asked=asked)
        extrapolated = "" if done == count else f", timed {done} of {count} images"
        return f"{text}, {spent:.2f} s for {done * len(sweep):,}{extrapolated}"

    def peer(name: str) -> dict[str, Any]:
        need_gpu()
        row = gpu_peers.peer_rate(network(110).model, (3, 32, 32), name, dtype, (1024, 4096), check.left() - 40)
        check.peers[name] = row["images_per_second"]
        return row

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

    def triton(name: str, draw: Callable[[Any], Any]) -> str:
        need_gpu()
        from resens_fast.kernels import check as kernels

        net = network(110)
        sweep = draw(net)
        found = kernels.rate(net, sweep, dtype, 10_000)
        work = FLOPS_PER_BLOCK * found["runs"] / max(1, len(sweep))
        asked = found["asked"] / max(1, len(sweep) * len(net.blocks))
        return check.row(f"{name} (triton)", found["rate"], "images x configurations/s", work, asked=asked)

    def paths() -> str:
        need_gpu()
        from resens_fast.kernels import check as kernels

        net = network(110)
        drawn = rf.sweeps.paths(net, range(1, 55), samples=4, seed=0)
        found = kernels.path_rate(net, drawn, dtype)
        work = FLOPS_PER_BLOCK * found["runs"] / len(drawn)
        return check.row("gradients along 216 paths (triton)", found["rate"], "images x paths/s", work)

    check.section("dense bf16 peak", peak, 20)
    for name, sweep, count, most in rows:
        check.section(name, lambda n=name, s=sweep, c=count, m=most: timed(n, s, c, m), most + 10)  # type: ignore[misc]
    half = "intact, float16"
    check.section(half, lambda: timed(half, rf.sweeps.intact, 10_000, 10, torch.float16), 20)
    check.section("eager, intact", lambda: peer("eager"), 20)
    check.section("resnet50", large, 40)
    for name, sweep, _, _ in rows[:2]:
        check.section(f"{name} (triton)", lambda n=name, s=sweep: triton(n, s), 60)  # type: ignore[misc]
    check.section("path gradients (triton)", paths, 60)
    # Compiling 54 blocks takes a minute or more and cannot be interrupted: after everything that is ours.
    for name in ("compile", "graphs"):
        check.section(f"{name}, intact", lambda n=name: peer(n), 110)  # type: ignore[misc]


def ratios(check: Check, row: dict[str, Any]) -> dict[str, float]:
    """How many times faster than each peer: those timed in the row's own section, else from the intact network."""
    found = {p: row[p] for p in gpu_peers.PEERS if p in row}
    if "asked" in row:
        found |= {p: row["ours"] * row["asked"] / rate for p, rate in check.peers.items() if rate}
    return found


def table(check: Check) -> str:
    head = "".join(f"{'x ' + p:>11}" for p in gpu_peers.PEERS) + f"{'of peak':>9}"
    lines = [f"{'':<44}{'per second':>12}" + head + "".join(f"{f:>12}" for f in roofline.FIGURES) + "  (model)"]
    for row in check.result["rows"]:
        row["times_peer"] = times = ratios(check, row)
        peers = "".join(f"{times[p]:>11.1f}" if p in times else f"{'-':>11}" for p in gpu_peers.PEERS)
        model, share = row.get("model") or {}, row["of_peak"]
        figures = "".join(f"{model[f]:>12,.0f}" if f in model else f"{'-':>12}" for f in roofline.FIGURES)
        of_peak = f"{share:>9.0%}" if share is not None else f"{'-':>9}"
        lines.append(f"{row['name']:<44}{row['ours']:>12,.0f}{peers}{of_peak}{figures}")
    bad = {k: v["reason"] for k, v in check.result["sections"].items() if v["state"] != "ok"}
    return "\n".join(lines + [f"not done: {k}: {v.splitlines()[0] if v else ''}" for k, v in bad.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--data")
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--only", choices=list(ALONE), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        answer(arguments.only)
        return
    if not arguments.out:
        parser.error("--out DIR is needed: the folder for gpu_check.json")
    try:
        check = Check(arguments)
    except OSError as error:
        parser.error(f"--out: {error}")
    check.section("environment", environment, 0)
    check.section("build", build, 60)
    for name in ALONE:
        if name != "tiny":
            check.section(name, lambda n=name: (need_gpu(), alone(n, 60))[1], 60)  # type: ignore[misc]
    timings(check)
    for tool in ("memcheck", "racecheck"):
        check.section(f"compute-sanitizer {tool}", lambda t=tool: sanitizer(t), 30)  # type: ignore[misc]
    check.finish()
    if all(entry["state"] != "ok" for name, entry in check.result["sections"].items() if name != "environment"):
        sys.exit("nothing was checked")


if __name__ == "__main__":
    main()
