"""What a model is measured on: pairs with scores, texts with labels, or text. Read from plain files.

    0.85<TAB>A man is dancing.<TAB>A man dances.    similarity        a number and two texts, the number first or last
    a long string of cliches<TAB>0                  classification    a text and a whole number, in either order
    Once upon a time ...                            perplexity        no tabs

A line is an example, tabs part its fields, and nothing is quoted: a quotation mark is text. A first line that names the
fields is left out. What a file is follows from what most of its lines are; `kind` and `columns` say it where they do
not, such as labels that are words, or lines with further fields.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from fxcompress.core.errors import EvaluationError

Kind = Literal["similarity", "classification", "perplexity"]
LABEL_HEADS = ("label", "labels", "class", "category", "sentiment", "target")

Row = tuple[int, list[str]]  # number of its line, from 1; fields


@dataclass(frozen=True)
class Similarity:
    """Scores of any scale, and the two texts of each pair."""

    scores: tuple[float, ...]
    first: tuple[str, ...]
    second: tuple[str, ...]


@dataclass(frozen=True)
class Classification:
    """Labels as they are written; `seconds` is empty where an example is one text and not two."""

    labels: tuple[str, ...]
    texts: tuple[str, ...]
    seconds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Perplexity:
    """Texts to be predicted; several are documents, of which none sees another."""

    texts: tuple[str, ...]


Task = Similarity | Classification | Perplexity


def read_task(
    path: str | os.PathLike[str],
    kind: str | None = None,
    columns: Sequence[int | str] | None = None,
    documents: bool = False,
) -> Task:
    """The task in a UTF-8 file.

    columns: which fields, by number from 0 or by the name in the first line: score, text, text; or text, label; or
        text, text, label (with kind="classification").
    documents: for perplexity: what stands between blank lines is a document of its own.

    Raises `EvaluationError`, with the number of the line where one is to blame.
    """
    path = Path(path)
    if kind is not None and kind not in get_args(Kind):
        raise EvaluationError(f"kind {kind!r} is none of {', '.join(get_args(Kind))}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path} is not UTF-8 (byte {error.start}); convert it first.") from error
    except OSError as error:
        raise EvaluationError(f"task file {path} cannot be read: {error.strerror}.") from error
    # "\n" alone ends a line: splitlines would also break at characters that occur within sentences
    lines = [(number, line.rstrip("\r").split("\t")) for number, line in enumerate(text.split("\n"), 1)]
    rows: list[Row] = [(number, fields) for number, fields in lines if any(field.strip() for field in fields)]
    if not rows:
        raise EvaluationError(f"task file {path} is empty.")
    if columns is not None:
        rows, places = _named(path, rows, columns)
        kind = kind or {2: "classification", 3: "similarity"}.get(len(places))
    else:
        kind, places = _told(path, rows, kind)
    if kind == "perplexity":
        if columns is not None:
            raise EvaluationError("columns name fields of labelled lines; perplexity is of the whole text.")
        return Perplexity(_paragraphs(text) if documents else (text,))
    if documents:
        raise EvaluationError(f"{path} is a task of {kind}; documents are of perplexity.")
    if kind == "similarity" and len(places) == 3:
        return _similarity(path, rows, places)
    if kind == "classification" and len(places) in (2, 3):
        return _classification(path, rows, places)
    raise EvaluationError(
        f"{len(places)} columns: name three (score, text, text) for similarity, or two (text, label), or three "
        "(text, text, label), for classification."
    )


def _similarity(path: Path, rows: list[Row], places: Sequence[int]) -> Similarity:
    names = ("score", "text", "text")
    if len(rows) > 1 and places[0] < len(rows[0][1]) and _number(rows[0][1][places[0]]) is None:
        rows = rows[1:] if _number_at(rows[1], places[0]) else rows  # a line of names
    found = [_fields(path, row, places, names) for row in rows]
    scores = [_number(fields[0]) for fields in found]
    for (number, _), score, fields in zip(rows, scores, found):
        if score is None:
            raise EvaluationError(f"{path}, line {number}: the score {fields[0]!r} is no number.")
    told = tuple(score for score in scores if score is not None)
    if len(set(told)) < 2:
        raise EvaluationError(f"{path}: every score is {told[0]:g}, and nothing correlates with that.")
    return Similarity(told, tuple(f[1] for f in found), tuple(f[2] for f in found))


def _classification(path: Path, rows: list[Row], places: Sequence[int]) -> Classification:
    names = ("text", "label") if len(places) == 2 else ("text", "text", "label")
    if len(rows) > 1 and places[-1] < len(rows[0][1]) and rows[0][1][places[-1]].strip().lower() in LABEL_HEADS:
        rows = rows[1:]
    found = [_fields(path, row, places, names) for row in rows]
    return Classification(
        tuple(f[-1] for f in found), tuple(f[0] for f in found), tuple(f[1] for f in found if len(f) == 3)
    )


def _fields(path: Path, row: Row, places: Sequence[int], names: Sequence[str]) -> list[str]:
    number, fields = row
    wanted = ", ".join(f"{name} in field {place}" for place, name in zip(places, names))
    if len(fields) <= max(places):
        raise EvaluationError(
            f"{path}, line {number} has {len(fields)} field{'s' * (len(fields) != 1)}; wanted are {wanted}, counted "
            "from 0, with tabs between them."
        )
    picked = [fields[place].strip() for place in places]
    for place, name, field in zip(places, names, picked):
        if not field:
            raise EvaluationError(f"{path}, line {number}: the {name} in field {place} is empty.")
    return picked


def _named(path: Path, rows: list[Row], columns: Sequence[int | str]) -> tuple[list[Row], list[int]]:
    """-> (rows without the line of names where names are used, numbers of the columns)."""
    heads = [head.strip() for head in rows[0][1]]
    unknown = [c for c in columns if not (isinstance(c, int) or c.isdecimal() or c in heads)]
    if unknown:
        raise EvaluationError(
            f"{path} has no column {unknown[0]!r}: its first line is {', '.join(heads)[:200]}. Name columns as there, "
            "or by number from 0."
        )
    by_name = any(isinstance(c, str) and not c.isdecimal() for c in columns)
    places = [int(c) if isinstance(c, int) or c.isdecimal() else heads.index(c) for c in columns]
    if not places or min(places) < 0 or len(set(places)) < len(places):
        raise EvaluationError(f"columns {', '.join(map(str, columns))}: name each once, by number from 0.")
    return rows[1:] if by_name else rows, places


def _told(path: Path, rows: list[Row], kind: str | None) -> tuple[str, list[int]]:
    """Kind and columns as most lines have them; of a tie of numbers, the lines without further fields decide."""
    width = Counter(len(fields) for _, fields in rows).most_common(1)[0][0]
    if kind == "perplexity" or (kind is None and width == 1):
        return "perplexity", []
    alike = [fields for _, fields in rows if len(fields) == width]

    def mostly(place: int, whole: bool) -> bool:
        numbers = [_number(fields[place]) for fields in alike]
        return sum(n is not None and (not whole or n.is_integer()) for n in numbers) > len(alike) / 2

    if width == 3 and kind in (None, "similarity"):
        numeric = [place for place in range(3) if mostly(place, whole=False)]
        if numeric in ([0], [2]):
            return "similarity", [0, 1, 2] if numeric == [0] else [2, 0, 1]
    if width == 2 and kind in (None, "classification"):
        numeric = [place for place in range(2) if mostly(place, whole=True)]
        if len(numeric) == 1:
            return "classification", [1 - numeric[0], numeric[0]]
        if kind == "classification":
            return "classification", [0, 1]
    raise EvaluationError(
        f"{path} has {width} field{'s' * (width != 1)} in most lines, which does not say what "
        f"{'it is' if kind is None else f'is what for {kind}'}. Give columns by number from 0: score,text,text for "
        "similarity, or text,label for classification (--columns 4,5,6)."
    )


def _paragraphs(text: str) -> tuple[str, ...]:
    parts = "\n".join(line if line.strip() else "" for line in text.replace("\r\n", "\n").split("\n")).split("\n\n")
    return tuple(part.strip("\n") for part in parts if part.strip())


def _number_at(row: Row, place: int) -> bool:
    return place < len(row[1]) and _number(row[1][place]) is not None


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
