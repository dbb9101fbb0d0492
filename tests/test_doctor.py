"""The doctor names what is there and what is missing, and never fails."""

from __future__ import annotations

import pytest
import torch

from resens_fast import doctor, engines, extension

PARTS = {"versions", "extension", "engines", "cpu", "cuda", "data", "networks"}


def test_the_report_names_versions_engines_and_devices() -> None:
    report = doctor.report()
    assert report.keys() == PARTS
    assert not [part for part, facts in report.items() if "error" in facts], report
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(report["engines"]) == set(engines.names())
    assert report["engines"]["reference"] == "ready"
    assert report["cpu"]["torch threads"] == torch.get_num_threads()
    assert report["extension"]["compiled"].startswith("yes" if extension.reason() is None else "no: ")


def test_the_text_has_every_heading_and_fact() -> None:
    lines = doctor.text().splitlines()
    assert {line for line in lines if not line.startswith(" ")} == PARTS
    assert any(line.split()[:2] == ["torch", str(torch.__version__).split("+")[0]] for line in lines)


def test_a_missing_engine_and_a_missing_extension_come_with_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(engines.get("torch")), "missing", lambda self: "no such device")
    monkeypatch.setattr(extension, "reason", lambda: "it was built for another torch")
    report = doctor.report()
    assert report["engines"]["torch"] == "missing: no such device"
    assert report["extension"]["compiled"] == "no: it was built for another torch"


def test_a_part_that_fails_is_reported_and_the_others_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(engines, "names", broken)
    monkeypatch.setattr(type(engines.get("reference")), "missing", broken)
    monkeypatch.setattr("resens_fast.data.find_cifar10", broken)
    report = doctor.report()
    assert report["engines"] == {"error": "RuntimeError: the disk is on fire"}
    assert report["data"] == {"error": "RuntimeError: the disk is on fire"}
    assert report["versions"]["numpy"]
    assert "the disk is on fire" in doctor.text()


def test_one_broken_engine_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("no libfoo")

    monkeypatch.setattr(type(engines.get("torch")), "missing", broken)
    found = doctor.report()["engines"]
    assert (found["torch"], found["reference"]) == ("broken: OSError: no libfoo", "ready")


def test_a_machine_without_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError("/proc/cpuinfo")

    monkeypatch.setattr("builtins.open", absent)
    assert doctor.cpu_isas() == []
    assert doctor._cpu_name()
