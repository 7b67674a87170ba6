"""docs/zoo.md says what is so: every entry at 1x by every path, and some of them at 3x.

The whole page: python benchmarks/zoo.py --write
"""

from __future__ import annotations

import pytest

from benchmarks import zoo as benchmark
from benchmarks.models.zoo import ZOO
from benchmarks.zoo import HEADS, SAME, reason, trial
from fxcompress.carrying_out import OFF, SLIGHT

# One of each kind of weight: tables and linears, Conv1D, x @ weight.T, stacked experts, einsums, images, sound.
AT_3X = ("ELECTRA", "GPT-2", "Falcon", "Qwen3-MoE", "XLNet", "Swin", "wav2vec 2.0")
NUMBERS = ("3x predicted", "3x measured")


def told() -> dict[str, dict[str, str]]:
    return {name: dict(zip(HEADS, row, strict=True)) for name, row in benchmark.told().items()}


def test_the_page_lists_the_entries_in_order():
    assert [(name, row["task"]) for name, row in told().items()] == [(entry.name, entry.task) for entry in ZOO]
    assert len({entry.name for entry in ZOO}) == len(ZOO) >= 40


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_an_architecture_does_what_the_page_says(entry):
    row, page = trial(entry, compressed=entry.name in AT_3X), told()[entry.name]
    for path, found in row.paths.items():
        assert found == page[path], path
    for why in row.why:  # without the sizes, which follow the versions of libraries
        assert why.split(" (")[0] in page["why not"]
    if row.ratio is not None:
        assert row.ratio >= 3
    if row.measured is not None and row.predicted is not None:
        assert row.measured <= max(OFF * row.predicted, SLIGHT)


def test_every_path_works_on_what_captures_but_where_the_page_says_why():
    for name, row in told().items():
        marks = [value for head, value in row.items() if head[:2] in ("1x", "3x") and head not in NUMBERS]
        assert (set(marks) == {SAME}) == (not row["why not"]), name


def test_a_reason_is_the_first_sentence_on_one_line():
    error = ValueError("budget size <= 3x cannot be met: it reaches 2x (696.48 KB).\n  Ask for less | or more.")
    assert reason(error) == "budget size <= 3x cannot be met: it reaches 2x (696.48 KB)"
    assert reason(ValueError("a | b")) == r"a \| b"
