"""make demo: the real all-MiniLM-L6-v2, compressed at 4x and 8x, saved, loaded, and compared with the original.

Calibrated on docstrings of the Python standard library and judged on others: sentences no one wrote for this.
Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import pkgutil
import random
import shutil
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tabulate import tabulate

import fxcompress
from benchmarks.models import minilm

MODULES = [
    "argparse", "ast", "asyncio", "collections", "concurrent.futures", "configparser", "csv", "ctypes",
    "datetime", "decimal", "difflib", "email", "fractions", "functools", "http", "importlib", "inspect", "io",
    "ipaddress", "itertools", "json", "logging", "multiprocessing", "os", "pathlib", "pickle", "random", "re",
    "shutil", "socket", "sqlite3", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap",
    "threading", "tkinter", "typing", "unittest", "urllib", "uuid", "xml", "zipfile",
]  # fmt: skip
OUT = Path("demo-out")


def main() -> None:
    """Print what a user of an embedding model wants to know."""
    started = time.perf_counter()
    texts = docstrings()
    random.Random(0).shuffle(texts)
    calibration, judged = minilm.batches(texts[:128]), texts[128:1128]
    model = minilm.model()
    reference = minilm.embed(model, judged)
    print(
        f"all-MiniLM-L6-v2: {size_of(model) / 1e6:.2f} MB; calibrated on 128 docstrings, judged on {len(judged)}\n"
    )
    shutil.rmtree(OUT, ignore_errors=True)
    plan, rows = None, []
    for budget in ("4x", "8x"):
        begun = time.perf_counter()
        compiled = fxcompress.compile(model, budget, calibration=calibration, plan=plan)
        seconds = time.perf_counter() - begun
        plan = compiled.plan  # the second budget is chosen from the first one's candidates: nothing is priced twice
        folder = OUT / f"minilm-{budget}"
        fxcompress.save(compiled, folder)
        loaded = fxcompress.load(folder)
        embeddings = minilm.embed(loaded, judged)
        on_disk = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{compiled.plan}\n\n{compiled.report}\n")
        rows.append((
            budget, f"{on_disk / 1e6:.2f} MB", f"{minilm.mean_cosine(embeddings, reference):.4f}",
            f"{minilm.neighbour_overlap(embeddings, reference):.1%}", f"{seconds:.0f} s",
        ))  # fmt: skip
    print(
        tabulate(
            rows,
            headers=["budget", "on disk", "mean cosine", "top-10 neighbours kept", "compiled in"],
            disable_numparse=True,
        )
    )
    print(f"\nthe compressed models are in {OUT}/; the demo took {time.perf_counter() - started:.0f} s")


def docstrings() -> list[str]:
    """The first paragraph of every documented function and class of some thirty packages, 5 to 60 words, each once."""
    found: dict[str, None] = {}
    warnings.simplefilter("ignore")
    for name in MODULES:
        for module in submodules(name):
            for thing in vars(module).values():
                doc = getattr(thing, "__doc__", None)
                members = vars(thing).values() if isinstance(thing, type) else ()
                for text in (doc, *(getattr(m, "__doc__", None) for m in members)):
                    if isinstance(text, str):
                        paragraph = " ".join(text.strip().split("\n\n")[0].split())
                        if 5 <= len(paragraph.split()) <= 60:
                            found[paragraph] = None
    return sorted(found)


def submodules(name: str) -> list[object]:
    """The module and its direct submodules, those that import here."""
    modules: list[object] = []
    try:
        top = importlib.import_module(name)
    except ImportError:
        return modules
    modules.append(top)
    for info in pkgutil.iter_modules(getattr(top, "__path__", ())):
        if not info.name.startswith("_"):
            try:
                modules.append(importlib.import_module(f"{name}.{info.name}"))
            except Exception:  # a submodule for another platform
                continue
    return modules


def size_of(model: object) -> int:
    """Bytes of the parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
