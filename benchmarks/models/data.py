"""Readers of `../shared/data`, found relative to the project's root (its README.md describes every file).

Text comes as lists of str, images as float in [0, 1] of shape (N, C, H, W), labels as int64 (N,).
A file that is not there raises `DataMissing` naming the path looked for; tests turn it into a skip.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"


class DataMissing(FileNotFoundError):
    """Data or weights which are no part of the project and are not on this machine."""


def find(name: str) -> Path:
    """Path of the file `name` below DATA."""
    path = DATA / name
    if not path.is_file():
        raise DataMissing(f"{path} is absent: tests and benchmarks on real data need it")
    return path


def text(name: str) -> str:
    """The file text/`name`, e.g. "wikitext2/valid.txt", "tinyshakespeare/input.txt"."""
    return find(f"text/{name}").read_text(encoding="utf-8")


def stsb(split: str = "dev") -> tuple[list[float], list[str], list[str]]:
    """Sentence similarity, split train or dev: scores 0 to 5, first sentences, second sentences."""
    # Unquoted tabs, so no csv reader; "\n" alone ends a row. Some rows carry extra columns at the end.
    rows = [row.split("\t") for row in text(f"stsb/sts-{split}.csv").split("\n") if row]
    return [float(row[4]) for row in rows], [row[5] for row in rows], [row[6] for row in rows]


def sst2(split: str = "dev") -> list[tuple[str, int]]:
    """Sentiment, split train or dev: (text, 0 negative or 1 positive)."""
    rows = [row.rsplit("\t", 1) for row in text(f"sst2/{split}.tsv").split("\n") if row]
    return [(sentence, int(label)) for sentence, label in rows]


def tinystories(start: int = 0, stop: int = 60_000) -> list[str]:
    """Paragraphs, blank line between them, which lie whole in characters start to stop of the text.

    The default is the 281 that stories260K is scored on; take calibration text after them.
    """
    return text("tinystories/tinystories_val.txt")[start:stop].split("\n\n")[1:-1]  # both ends are cut short


def mnist(limit: int | None = None) -> tuple[Tensor, Tensor]:
    """The first `limit` (at most 12,000) training images (N, 1, 28, 28) and digits (N,)."""
    rows = _pixels((f"vision/mnist/train/mnist_batch_{i}.png" for i in range(4)), limit)  # (N, 784)
    with gzip.open(find("vision/mnist/train-labels-idx1-ubyte.gz")) as file:
        labels = torch.frombuffer(bytearray(file.read()[8:]), dtype=torch.uint8)  # 8: magic number and count
    return rows.reshape(-1, 1, 28, 28), labels[: len(rows)].long()


def cifar10(limit: int | None = None) -> tuple[Tensor, Tensor]:
    """The first `limit` (at most 2,000) training images (N, 3, 32, 32) and classes (N,)."""
    rows = _pixels((f"vision/cifar10/cifar10_batch_{i}.png" for i in range(2)), limit)  # (N, 1024, 3)
    script = find("vision/cifar10/cifar10_labels.js").read_text()  # var labels=[6, 9, ...];
    labels = json.loads(script[script.index("[") : script.rindex("]") + 1])
    images = rows.reshape(-1, 32, 32, 3).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(labels[: len(rows)])


def _pixels(names: Iterable[str], limit: int | None) -> Tensor:
    """Rows of PNG files, one image a row, in [0, 1]; opens no more files than `limit` rows need."""
    from PIL import Image  # here, so that the text is read without pillow

    parts: list[Tensor] = []
    for name in names:
        if limit is None or sum(map(len, parts)) < limit:
            parts.append(torch.from_numpy(np.array(Image.open(find(name)))))
    return torch.cat(parts)[:limit].float() / 255
