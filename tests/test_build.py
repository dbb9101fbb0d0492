"""The build's decisions, and that a library which does not fit is a sentence and not a crash."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from resens_fast import extension

ROOT = Path(__file__).parents[1]
FORBIDDEN = re.compile(r"-march=native|-mtune=native|-Ofast|fast[-_]math|-funsafe")


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    """setup.py as a module; it builds only when it is run."""
    spec = importlib.util.spec_from_file_location("resens_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_nvcc(folder: Path, version: str = "13.0", codes: str = "sm_75 sm_80 sm_90 sm_90a sm_100 sm_120") -> Path:
    """A toolkit whose nvcc answers questions and compiles nothing."""
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f"*--version*) echo 'Cuda compilation tools, release {version}, V{version}.1';;\n"
        f"*--list-gpu-code*) printf '%s\\n' {codes};;\n"
        f"*--dryrun*) echo '#$ TOP={folder}' >&2;;\n"
        "*) echo 'fatal: this nvcc compiles nothing' >&2; exit 1;;\nesac\n"
    )
    nvcc.chmod(0o755)
    return folder


def test_the_extension_of_this_checkout_is_loaded() -> None:
    """`make test` builds it; if this fails everything else runs on the pure Python path unnoticed."""
    assert extension.reason() is None
    module = extension.module()
    assert module is not None
    assert module.build_info()["isas"] == extension.info()["isas"]
    assert module.build_info()["cuda"] == (extension.info()["cuda"] is not None)


def installed_copy(folder: Path, **changes: Any) -> Path:
    """This build's information, changed, beside a library that is never opened."""
    info = {**extension.info(), **changes}
    (folder / "_build.json").write_text(json.dumps(info))
    with open(folder / str(extension.info()["library"]), "wb") as file:
        file.truncate(extension.info()["bytes"])
    return folder


def test_a_fitting_build_passes_the_check(tmp_path: Path) -> None:
    assert extension.check(installed_copy(tmp_path))[1] is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"torch": "1.0.0"}, "was built for torch 1.0.0, but this is "),
        ({"python": "cpython-27-x86_64-linux-gnu"}, "was built for Python ABI cpython-27"),
        ({"cxx11_abi": None}, "was built for C++ ABI"),
        ({"library": "_C.gone.so"}, "_C.gone.so is missing"),
        ({"bytes": 1}, "is not the library that _build.json describes"),
        ({"format": 0}, "is not build information of this version"),
    ],
)
def test_a_build_that_does_not_fit_is_refused_in_one_sentence(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    _, why = extension.check(installed_copy(tmp_path, **change))
    assert why is not None
    assert sentence in why
    assert "pip install --no-build-isolation" in why
    assert "\n" not in why


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "\x00"])
def test_missing_or_damaged_build_information(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "_build.json").write_text(content)
    info, why = extension.check(tmp_path)
    assert info is None
    assert why is not None
    assert str(tmp_path / "_build.json") in why


def python(code: str, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, cwd=folder, timeout=300,
        env={**os.environ, "PYTHONPATH": str(folder), **environ},
    )  # fmt: skip


PLAN = """
    import resens_fast as rf
    from resens_fast import extension, planner_py
    net = rf.wrap(rf.models.resnet(8))
    plan = rf.plan(net, rf.sweeps.single(net))
    print(isinstance(plan._trie, planner_py.Trie), plan.words, extension.reason())
"""


def test_a_library_for_another_torch_is_never_loaded(tmp_path: Path) -> None:
    """The library is replaced by zeros, which the loader would complain about in words of its own."""
    ignored = shutil.ignore_patterns("kernels", "__pycache__", "_C*", "*.safetensors")
    shutil.copytree(ROOT / "resens_fast", tmp_path / "resens_fast", ignore=ignored)
    installed_copy(tmp_path / "resens_fast", torch="9.9.9")
    done = python(PLAN, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True 3 resens_fast._C was built for torch 9.9.9, but this is ")


def test_the_extension_can_be_switched_off() -> None:
    done = python(PLAN, ROOT, RESENS_FAST_EXTENSION="0")
    assert done.stdout.strip() == "True 3 resens_fast._C is switched off by RESENS_FAST_EXTENSION=0", done.stderr


def test_cuda_is_decided_by_its_parts(setup: ModuleType, tmp_path: Path) -> None:
    home = str(fake_nvcc(tmp_path / "cuda"))
    found, _ = setup.decide_cuda({"CUDA_HOME": home}, "13.2")
    assert found == {"home": home, "version": "13.0", "architectures": "8.0;9.0;10.0;12.0+PTX"}
    # Found through PATH too, also when a script stands in for it far from the headers.
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "nvcc"
    script.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    assert setup.decide_cuda({"PATH": str(script.parent)}, "13.2")[0] == found


@pytest.mark.parametrize(
    ("environ", "torch_cuda", "why"),
    [
        ({"PATH": "/nonexistent"}, "13.0", "nvcc was not found"),
        ({"CUDA_HOME": "/nonexistent", "PATH": os.environ.get("PATH", "")}, "13.0", "nvcc was not found"),
        ({"CUDA_HOME": "{cuda}"}, None, "torch is a build without CUDA"),
        ({"CUDA_HOME": "{cuda}"}, "12.9", "nvcc is CUDA 13.0, but torch was built with CUDA 12.9"),
        ({"CUDA_HOME": "{old}"}, "13.0", "nvcc 13.0 knows none of the architectures 8.0, 9.0"),
    ],
)
def test_a_missing_part_is_named(
    setup: ModuleType, tmp_path: Path, environ: dict[str, str], torch_cuda: str | None, why: str
) -> None:
    folders = {"cuda": fake_nvcc(tmp_path / "cuda"), "old": fake_nvcc(tmp_path / "old", codes="sm_70")}
    environ = {name: value.format(**folders) for name, value in environ.items()}
    found, reason = setup.decide_cuda(environ, torch_cuda)
    assert found is None
    assert why in reason
    with pytest.raises(SystemExit, match="RESENS_FAST_CUDA=1, but the CUDA part cannot be built: ") as caught:
        setup.decide_cuda({**environ, "RESENS_FAST_CUDA": "1"}, torch_cuda)
    assert why in str(caught.value)


def test_cuda_switched_off_or_misspelt(setup: ModuleType, tmp_path: Path) -> None:
    home = str(fake_nvcc(tmp_path / "cuda"))
    assert setup.decide_cuda({"CUDA_HOME": home, "RESENS_FAST_CUDA": "0"}, "13.0")[0] is None
    with pytest.raises(SystemExit, match="RESENS_FAST_CUDA is 'yes'"):
        setup.decide_cuda({"RESENS_FAST_CUDA": "yes"}, "13.0")


def test_setup_stops_when_cuda_is_demanded_and_nvcc_hidden(tmp_path: Path) -> None:
    environ = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "--version"], capture_output=True, text=True, cwd=ROOT, timeout=300,
        env={**environ, "PATH": str(tmp_path), "RESENS_FAST_CUDA": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert re.search("RESENS_FAST_CUDA=1, but the CUDA part cannot be built: .*(nvcc|without CUDA)", done.stderr)
    assert "Traceback" not in done.stderr


def test_an_old_setuptools_is_a_sentence(setup: ModuleType) -> None:
    setup.check_setuptools("77.0.3")
    with pytest.raises(
        SystemExit, match=r"needs setuptools 77 or newer, but this is 65\.5\.0; pip install -U setuptools"
    ):
        setup.check_setuptools("65.5.0")


@pytest.mark.parametrize(
    ("environ", "known", "chosen"),
    [
        ({}, ["75", "80", "86", "90", "90a", "100", "120"], "8.0;9.0;10.0;12.0+PTX"),
        ({}, ["70", "80", "90"], "8.0;9.0+PTX"),
        ({}, ["70"], ""),
        ({"TORCH_CUDA_ARCH_LIST": "8.6"}, ["80"], "8.6"),
    ],
)
def test_the_default_architectures_are_those_that_nvcc_knows(
    setup: ModuleType, environ: dict[str, str], known: list[str], chosen: str
) -> None:
    assert setup.architectures(environ, known) == chosen


def test_no_flag_breaks_portability_or_arithmetic(setup: ModuleType) -> None:
    flags = [*setup.CXX_FLAGS, *setup.NVCC_FLAGS, *(flag for isa in setup.ISA_FLAGS.values() for flag in isa)]
    ours = [
        re.sub(r"\$cflags|\$post_cflags", "", p.read_text()) for p in (ROOT / "build").glob("objects-*/**/build.ninja")
    ]
    assert not FORBIDDEN.search("\n".join([*flags, *ours]))
    assert "-ffp-contract=off" in setup.CXX_FLAGS
    assert "-ffp-contract=off" in setup.NVCC_FLAGS
    assert not [flag for flag in setup.CXX_FLAGS if flag.startswith("-m")], "instruction sets belong to ISA_FLAGS"


def test_a_source_has_the_flags_of_its_suffix(setup: ModuleType) -> None:
    named = {"winograd_avx2": "avx2", "winograd_avx512": "avx512", "eval_avx512bf16": "avx512bf16", "ops_cpu": None}
    assert {name: setup.isa_of(Path(f"csrc/cpu/{name}.cpp")) for name in named} == named


def test_instruction_sets_are_left_out_on_other_processors(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [Path("a_avx2.cpp"), Path("a.cpp")]
    monkeypatch.setattr(setup.platform, "machine", lambda: "aarch64")
    assert setup.usable_isas(sources) == []
    monkeypatch.setattr(setup.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(setup, "_output", lambda command: "")
    assert setup.usable_isas(sources) == ["avx2"]
    monkeypatch.setattr(setup, "_output", lambda command: None)
    assert setup.usable_isas(sources) == [], "a compiler that does not know the flag cannot be asked to use it"


def test_setup_and_package_agree_on_the_record(setup: ModuleType) -> None:
    assert setup.BUILD_INFO_FORMAT == extension.FORMAT
    assert setup.source_hash() == extension.source_hash(ROOT)


def test_every_package_is_listed() -> None:
    """The list in pyproject.toml is written by hand; a folder that it lacks would be missing from the wheel only."""
    listed = set(
        re.findall(
            r'"(resens_fast[\w.]*)"', re.findall(r"^packages = (.*)$", (ROOT / "pyproject.toml").read_text(), re.M)[0]
        )
    )
    folders = {p.parent for p in (ROOT / "resens_fast").rglob("__init__.py")} | {ROOT / "resens_fast" / "kernels"}
    assert listed == {".".join(folder.relative_to(ROOT).parts) for folder in folders}


def checkout(folder: Path) -> Path:
    """The files a build needs."""
    for name in ("csrc", "kernels", "resens_fast"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("kernels", "_C*", "_build.json", "__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "kernels", folder / "kernels", dirs_exist_ok=True)
    return folder


def build(folder: Path, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *command], capture_output=True, text=True, cwd=folder, timeout=900,
        env={**os.environ, **environ},
    )  # fmt: skip


def test_an_isolated_build_without_torch_gives_the_pure_python_package(tmp_path: Path) -> None:
    folder = checkout(tmp_path / "checkout")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    done = build(folder, "bdist_wheel", PYTHONPATH=str(hidden), RESENS_FAST_CUDA="")
    assert done.returncode == 0, done.stderr
    assert "installing the pure Python package" in done.stderr
    wheel = next((folder / "dist").iterdir())
    assert wheel.name.endswith("-py3-none-any.whl")
    demanded = build(folder, "--version", PYTHONPATH=str(hidden), RESENS_FAST_CUDA="1")
    assert demanded.returncode != 0
    assert "RESENS_FAST_CUDA=1" in demanded.stderr


@pytest.mark.slow
def test_when_the_cuda_part_does_not_compile_the_rest_is_built(tmp_path: Path) -> None:
    """A toolkit that compiles nothing: loud and C++ only, or an error where CUDA is demanded."""
    import torch

    if torch.version.cuda is None:
        pytest.skip("this torch is a build without CUDA")
    folder = checkout(tmp_path / "checkout")
    home = str(fake_nvcc(tmp_path / "cuda", version=torch.version.cuda))
    demanded = build(folder, "build_ext", "--inplace", CUDA_HOME=home, RESENS_FAST_CUDA="1")
    assert demanded.returncode != 0
    assert "RESENS_FAST_CUDA=1, but the CUDA part cannot be built: its compilation failed" in demanded.stderr
    assert not (folder / "resens_fast" / "_build.json").exists()
    done = build(folder, "build_ext", "--inplace", CUDA_HOME=home, RESENS_FAST_CUDA="")
    assert done.returncode == 0, done.stderr
    assert "*** resens_fast: NO CUDA: its compilation failed" in done.stderr
    assert "resens_fast: built _C with C++ (ISAs: portable" in done.stdout
    info, why = extension.check(folder / "resens_fast")
    assert why is None
    assert info is not None
    assert (info["cuda"], info["architectures"]) == (None, [])
    answer = python("from resens_fast import extension as e; print(e.reason(), e.module().cuda_devices())", folder)
    assert answer.stdout.strip() == "None ([], 'this build has no CUDA part')", answer.stderr


@pytest.fixture(scope="module")
def cpu_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a torch that has no CUDA, from pip's find-links; the other packages are those of this Python."""
    folder = tmp_path_factory.mktemp("cpu-torch")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*pip, "torch"], capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"no torch wheel where pip looks without an index (find-links): {done.stderr.strip()[-200:]}")
    version = next(folder.glob("torch/version.py")).read_text()
    if "cuda: Optional[str] = None" not in version:
        pytest.skip("the torch wheel in pip's find-links is a build with CUDA; torch+cpu is needed")
    return folder


@pytest.mark.slow
def test_a_build_against_a_torch_without_cuda(cpu_torch: Path, tmp_path: Path) -> None:
    """nvcc is there or not: the CPU part is built and used, and the CUDA engine says what it lacks."""
    folder = checkout(tmp_path / "checkout")
    done = build(folder, "build_ext", "--inplace", PYTHONPATH=str(cpu_torch), RESENS_FAST_CUDA="")
    assert done.returncode == 0, done.stderr
    assert "no CUDA: torch is a build without CUDA" in done.stdout
    code = """
        import torch
        import resens_fast as rf
        from resens_fast import engines, extension
        from resens_fast.engines.ops import has_kernel
        assert torch.version.cuda is None and extension.reason() is None, extension.reason()
        assert (has_kernel("cpu"), has_kernel("cuda")) == (True, False)
        net = rf.wrap(rf.models.resnet(8).eval())
        data = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64)
        sweep = rf.sweeps.single(net)
        fast, exact = (rf.evaluate(net, sweep, data, engine=e, progress=False).frame for e in ("cpu", "reference"))
        assert abs(fast.loss - exact.loss).max() < 1e-4
        print(engines.get("cuda").missing())
    """
    answer = python(code, folder, PYTHONPATH=f"{folder}{os.pathsep}{cpu_torch}")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "resens_fast._C was built without CUDA: torch is a build without CUDA"
    demanded = build(folder, "--version", PYTHONPATH=str(cpu_torch), RESENS_FAST_CUDA="1")
    assert demanded.returncode != 0
    assert "RESENS_FAST_CUDA=1, but the CUDA part cannot be built: torch is a build without CUDA" in demanded.stderr
