"""The README's example is run, and prints what the README says it prints."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_example_prints_what_the_readme_shows():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (shown,) = re.findall(r"```text\n(.*?)```", README, re.S)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert coarse(printed.getvalue()) == coarse(shown)


def coarse(text: str) -> list[str]:
    """Lines without decimal fractions: the last bits of a sum differ between processors."""
    return [re.sub(r"(\d+)\.\d+", r"\1", re.sub(r"\s+|-+", " ", line)).strip() for line in text.strip().splitlines()]
