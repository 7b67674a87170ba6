"""The README's examples are run, one after the other, and print what the README says they print."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_examples_print_what_the_readme_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```\s*```text\n(.*?)```", README, re.S)
    assert len(examples) == README.count("```python") == README.count("```text") > 1
    names: dict[str, object] = {}
    for code, shown in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), names)
        assert coarse(printed.getvalue()) == coarse(shown)


def test_each_way_to_use_a_compressed_model_takes_five_lines_or_fewer():
    section = README.partition("## In place of the original")[2].partition("\n## ")[0]
    ways = section.split("\n### ")[1:]
    assert len(ways) > 4
    for way in ways:
        assert all(code.count("\n") <= 5 for code in re.findall(r"```python\n(.*?)```", way, re.S))


def coarse(text: str) -> list[str]:
    """Lines without decimal fractions: the last bits of a sum differ between processors."""
    return [re.sub(r"(\d+)\.\d+", r"\1", re.sub(r"\s+|-+", " ", line)).strip() for line in text.strip().splitlines()]
