"""Everything that README.md shows works: its Python runs, its commands parse, its files and names exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from resens_fast import engines, figures
from resens_fast.cli import app

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text() if (ROOT / "README.md").is_file() else ""
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.S)


def test_python_blocks_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = [code for language, code in BLOCKS if language == "python"]
    assert len(blocks) >= 4
    for code in blocks:
        exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "runs" / "readme.png").stat().st_size > 1000
    assert names["study"].complete


def test_fences_come_in_pairs() -> None:
    fences = re.findall(r"^```(.*)$", TEXT, re.M)
    assert all(opening and not closing for opening, closing in zip(fences[::2], fences[1::2], strict=True)), fences


def test_commands_parse() -> None:
    group: Any = typer.main.get_command(app)
    shell = "\n".join(code for language, code in BLOCKS if language == "sh")
    commands = [shlex.split(line, comments=True)[1:] for line in shell.splitlines() if line.startswith("resens ")]
    assert {words[0] for words in commands} >= set(group.commands) - {"demo"}
    for words in commands:
        group.commands[words[0]].make_context(words[0], list(words[1:]))  # parses, runs nothing


def test_make_targets_and_linked_files_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", TEXT, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / link).exists(), link


def test_tables_list_what_there_is() -> None:
    listed = re.findall(r"^\| `([\w-]+)` \|", TEXT, re.M)
    assert set(engines.names()) <= set(listed), "an engine is missing from the table"
    assert set(listed) - set(engines.names()) == set(figures._BEST)
