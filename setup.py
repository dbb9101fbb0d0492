"""Builds resens_fast._C; everything that is not the extension stands in pyproject.toml.

The extension is C++ always and CUDA where nvcc and a CUDA build of torch are there (never decided by a visible GPU):
RESENS_FAST_CUDA unset = best effort, 1 = a missing part is an error that names it, 0 = never.
RESENS_FAST_EXTENSION=0 installs without any compiled part; TORCH_CUDA_ARCH_LIST and MAX_JOBS work as in torch.

The extension must be compiled against the torch that will load it, so the way to install is
`pip install --no-build-isolation .` with torch there already. pyproject.toml does not list torch as a build
requirement: an isolated build would download gigabytes of a torch that need not be the one next door, and its library
would be refused at import. So an isolated build finds no torch, installs the pure Python package, and says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
BUILD_INFO_FORMAT = 1  # resens_fast/extension.py reads the same number

# No -march=native (the library must run on other machines) and no fast-math (results are promised bit for bit);
# -ffp-contract=off because gcc contracts intrinsics too, and two instantiations would differ in the last bit.
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
# nvcc contracts a * b + c into one fma (--fmad=true, its default) and that stays: device results are compared within
# a kernel bit for bit and with the host within a tolerance. --use_fast_math would also change division and denormals.
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler", "-ffp-contract=off", "-Xcompiler", "-fvisibility=hidden"]
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")  # each is kept if nvcc knows it; the last one also as PTX

# csrc/cpu/<name>_<suffix>.cpp is compiled with these flags besides the common ones, on x86-64 only, and the other
# sources see -DRESENS_<SUFFIX>. Such a file must keep everything in an anonymous namespace and stay away from templates
# of the standard library: the linker keeps one copy of each, perhaps this one, and an older CPU would trip over it.
_AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": _AVX512,
    "avx512bf16": [*_AVX512, "-mavx512bf16"],
}


class MissingPart(SystemExit):
    """Something that is demanded is not there: one sentence and no traceback."""


def isa_of(source: Path) -> str | None:
    """The instruction set that a source is compiled for, from its name; None for the common ones."""
    suffix = source.stem.rpartition("_")[2]
    return suffix if suffix in ISA_FLAGS else None


def usable_isas(sources: list[Path]) -> list[str]:
    """Those instruction sets among the sources that this machine's compiler can target."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    wanted = {isa for isa in map(isa_of, sources) if isa}
    command = [os.environ.get("CXX", "c++"), "-x", "c++", "-fsyntax-only", os.devnull]
    return [isa for isa in ISA_FLAGS if isa in wanted and _output([*command, *ISA_FLAGS[isa]]) is not None]


def _output(command: list[str]) -> str | None:
    """What a command prints, None when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout + done.stderr


def cuda_home(environ: dict[str, str]) -> Path | None:
    """The toolkit: CUDA_HOME, CUDA_PATH, nvcc on PATH (followed through wrapper scripts), /usr/local/cuda."""
    named = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    if named:
        return Path(named) if (Path(named) / "bin" / "nvcc").is_file() else None
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc:
        # A dry run names the folder nvcc works from: /usr/local/bin/nvcc may be a script, with no headers around it.
        told = _output([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]) or ""
        top = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
        home = Path(top.group(1).strip()).resolve() if top else Path(nvcc).resolve().parent.parent
        if (home / "include" / "cuda_runtime.h").is_file():
            return home
    usual = Path("/usr/local/cuda")
    return usual if environ.get("PATH") and nvcc and (usual / "bin" / "nvcc").is_file() else None


def architectures(environ: dict[str, str], known: list[str]) -> str:
    """TORCH_CUDA_ARCH_LIST, or its default among the architectures ("80", "90a", ...) that nvcc knows."""
    if environ.get("TORCH_CUDA_ARCH_LIST"):
        return environ["TORCH_CUDA_ARCH_LIST"]
    chosen = [a for a in DEFAULT_ARCHITECTURES if a.replace(".", "") in known]
    return ";".join(chosen) + "+PTX" if chosen else ""


def decide_cuda(environ: dict[str, str], torch_cuda: str | None) -> tuple[dict[str, str] | None, str]:
    """What to build with, {home, version, architectures}, or None; and the reason in a few words.

    `torch_cuda` is torch.version.cuda. Raises MissingPart when RESENS_FAST_CUDA=1 and something is missing.
    """
    wish = environ.get("RESENS_FAST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise MissingPart(f"RESENS_FAST_CUDA is {wish!r}; leave it unset (best effort) or set it to 1 or 0")
    if wish == "0":
        return None, "switched off by RESENS_FAST_CUDA=0"
    if not list((ROOT / "csrc" / "cuda").glob("*.cu")):
        why = "csrc/cuda has no sources"
    elif not torch_cuda:
        why = "torch is a build without CUDA"
    elif (home := cuda_home(environ)) is None:
        why = "nvcc was not found (set CUDA_HOME or PATH)"
    elif not (release := re.search(r"release (\d+\.\d+)", _output([str(home / "bin" / "nvcc"), "--version"]) or "")):
        why = f"{home}/bin/nvcc does not run"
    elif release.group(1).split(".")[0] != torch_cuda.split(".")[0]:
        # Within a major version CUDA's libraries are compatible, and torch allows it too.
        why = f"nvcc is CUDA {release.group(1)}, but torch was built with CUDA {torch_cuda}"
    else:
        known = re.findall(r"sm_(\w+)", _output([str(home / "bin" / "nvcc"), "--list-gpu-code"]) or "")
        chosen = architectures(environ, known)
        if chosen:
            return {"home": str(home), "version": release.group(1), "architectures": chosen}, ""
        why = f"nvcc {release.group(1)} knows none of the architectures {', '.join(DEFAULT_ARCHITECTURES)}"
    if wish == "1":
        raise MissingPart(f"RESENS_FAST_CUDA=1, but the CUDA part cannot be built: {why}")
    return None, why


def source_hash() -> str:
    """One hash over csrc and this file, to see whether a library is older than its sources."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "csrc").rglob("*"), ROOT / "setup.py"]):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh", ".py"):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Two builds of one checkout at a time would mix their objects."""
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def extension_arguments() -> dict[str, Any]:
    """ext_modules and cmdclass for setup(); empty when there is to be no extension."""
    if os.environ.get("RESENS_FAST_EXTENSION") == "0":
        print("resens_fast: built no _C: switched off by RESENS_FAST_EXTENSION=0")
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        if os.environ.get("RESENS_FAST_CUDA") == "1":
            raise MissingPart(f"RESENS_FAST_CUDA=1, but the CUDA part cannot be built: {error}") from None
        print(
            f"resens_fast: built no _C ({error}): installing the pure Python package, which is slower. For the "
            "extension install torch first, then `pip install --no-build-isolation .`",
            file=sys.stderr,
        )
        return {}

    cuda, why = decide_cuda(dict(os.environ), torch.version.cuda)

    class Build(cpp_extension.BuildExtension):
        """torch's, with flags per instruction set, a fallback without CUDA, and _build.json beside the library."""

        def finalize_options(self) -> None:
            super().finalize_options()
            # One place for objects, also for pip's editable builds (which would start from nothing each time), and
            # one per Python and torch, since objects for another torch look just as fresh.
            name = f"objects-{sysconfig.get_config_var('SOABI')}-torch{torch.__version__}"
            self.build_temp = str(ROOT / "build" / name)

        def run(self) -> None:
            with locked():
                for folder in {Path(self.build_lib), ROOT} if self.inplace else {Path(self.build_lib)}:
                    (folder / "resens_fast" / "_build.json").unlink(missing_ok=True)  # until the library is in place
                super().run()
                library = Path(self.build_lib) / self.get_ext_filename("resens_fast._C")
                record = json.dumps(self.describe(library), indent=1) + "\n"
                (library.parent / "_build.json").write_text(record)
                if self.inplace:
                    (ROOT / "resens_fast" / "_build.json").write_text(record)
            isas = ", ".join(["portable", *self.isas])
            gpu = f"CUDA {cuda['version']} ({', '.join(self.targets())})" if cuda else f"no CUDA: {why}"
            print(f"resens_fast: built _C with C++ (ISAs: {isas}), {gpu}", flush=True)

        def build_extensions(self) -> None:
            nonlocal cuda, why
            if cuda:
                try:
                    self.build_with(cuda)
                    return
                except Exception as error:  # a compiler's failure has many types; C++ alone must still be tried
                    message = str(error).strip().splitlines() or [type(error).__name__]
                    why = f"its compilation failed ({message[0]})"
                    if os.environ.get("RESENS_FAST_CUDA") == "1":
                        raise MissingPart(f"RESENS_FAST_CUDA=1, but the CUDA part cannot be built: {why}") from error
                    print(f"\n*** resens_fast: NO CUDA: {why}; building C++ only ***\n", file=sys.stderr, flush=True)
                    cuda = None
            self.build_with(None)

        def build_with(self, with_cuda: dict[str, str] | None) -> None:
            extension = self.extensions[0]
            sources = [*sorted((ROOT / "csrc").glob("*.cpp")), *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
            self.isas = usable_isas(sources)
            flags = [*CXX_FLAGS, *(f"-DRESENS_{isa.upper()}" for isa in self.isas)]
            extension.extra_objects = self.compile_isas([s for s in sources if isa_of(s) in self.isas])
            sources = [s for s in sources if isa_of(s) is None]
            extension.include_dirs = [str(ROOT / "csrc"), *cpp_extension.include_paths("cpu")]
            extension.library_dirs = cpp_extension.library_paths("cpu")
            extension.libraries = ["c10", "torch", "torch_cpu", "torch_python"]
            if with_cuda:
                os.environ["TORCH_CUDA_ARCH_LIST"] = with_cuda["architectures"]
                os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = with_cuda["home"]
                folder = ROOT / "csrc" / "cuda"
                sources += [*sorted(folder.glob("*.cpp")), *sorted(folder.glob("*.cu"))]
                flags.append("-DWITH_CUDA")
                extension.include_dirs += cpp_extension.include_paths("cuda")
                extension.library_dirs += cpp_extension.library_paths("cuda")
                extension.libraries += ["cudart", "c10_cuda", "torch_cuda"]
            extension.sources = [os.path.relpath(s, ROOT) for s in sources]  # absolute paths leave build_temp
            extension.extra_compile_args = {"cxx": flags, "nvcc": NVCC_FLAGS}
            super().build_extensions()

        def compile_isas(self, sources: list[Path]) -> list[str]:
            """Objects of the sources that have flags of their own, which torch's ninja file cannot express."""
            if not sources:
                return []
            folder = Path(self.build_temp) / "isa"
            folder.mkdir(parents=True, exist_ok=True)
            lines = [
                f"cxx = {os.environ.get('CXX', 'c++')}",
                f"flags = {' '.join(CXX_FLAGS)} -fPIC -I{ROOT / 'csrc'}",
                "rule cxx",
                "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
            objects = [str(folder / f"{source.stem}.o") for source in sources]
            for source, target in zip(sources, objects, strict=True):
                lines += [f"build {target}: cxx {source}", f"  more = {' '.join(ISA_FLAGS[isa_of(source) or ''])}"]
            (folder / "build.ninja").write_text("\n".join(lines) + "\n")
            jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
            subprocess.run(["ninja", *jobs, "-C", str(folder)], check=True)
            return objects

        def targets(self) -> list[str]:
            flags = cpp_extension._get_cuda_arch_flags() if cuda else []
            codes = {flag.rpartition("code=")[2] for flag in flags}
            return sorted(codes, key=lambda code: (code.startswith("compute"), int(re.sub(r"\D", "", code)), code))

        def describe(self, library: Path) -> dict[str, Any]:
            compiler = _output([os.environ.get("CXX", "c++"), "--version"]) or "unknown"
            return {
                "format": BUILD_INFO_FORMAT,
                "library": library.name,
                "bytes": library.stat().st_size,
                "python": sysconfig.get_config_var("SOABI"),
                "torch": str(torch.__version__),
                "cxx11_abi": torch.compiled_with_cxx11_abi(),
                "compiler": compiler.splitlines()[0],
                "isas": self.isas,
                "cuda": cuda["version"] if cuda else None,
                "cuda_reason": why or None,
                "architectures": self.targets(),
                "sources": source_hash(),
            }

    depends = [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")]
    module = Extension("resens_fast._C", sources=["csrc/ops.cpp"], language="c++", depends=depends)
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


def check_setuptools(version: str) -> None:
    """Without build isolation pip does not look at pyproject.toml's build requirements, and an older one rejects it."""
    if int(version.split(".")[0]) < 77:
        raise MissingPart(f"resens_fast needs setuptools 77 or newer, but this is {version}; pip install -U setuptools")


if __name__ == "__main__":
    check_setuptools(setuptools.__version__)
    setup(**extension_arguments())
