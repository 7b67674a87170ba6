"""Which architectures work, by which path: every entry of benchmarks/models/zoo.py compressed, run, saved and loaded.

    1x    graph, module mode and backend give the model's own bits
    3x    the folder is a third; measured error beside predicted; loaded, module mode and backend give the graph's bits

python benchmarks/zoo.py [NAME ...] [--write]      a table, and with --write docs/zoo.md, or its rows of these names
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils import _pytree as pytree

import fxcompress
from benchmarks.models.zoo import ZOO, Entry
from fxcompress.carrying_out import SLIGHT
from fxcompress.core.errors import CaptureError, FxcompressError
from fxcompress.core.signature import SignedModule

PAGE = Path(__file__).resolve().parents[1] / "docs" / "zoo.md"
REWRITES = ["quantize", "low_rank"]  # the two that win most; all of them take a half more time
BATCHES = 8
SAME, NO, UNTRIED = "same bits", "no", ""
PATHS = ("1x graph", "1x module", "1x backend", "3x loaded", "3x module", "3x backend")
HEADS = ("architecture", "task", *PATHS[:3], "3x predicted", "3x measured", *PATHS[3:], "why not")


@dataclass
class Row:
    """What came of one entry."""

    entry: Entry
    paths: dict[str, str] = field(default_factory=dict)  # of PATHS: SAME, NO, or the largest difference
    kind: str = ""  # of error: relative, or nats of KL
    predicted: float | None = None
    measured: float | None = None
    ratio: float | None = None  # bytes of the model over those of the folder
    why: list[str] = field(default_factory=list)

    @property
    def cells(self) -> tuple[str, ...]:
        """In the order of HEADS."""
        marks = [self.paths.get(path, UNTRIED) for path in PATHS]
        errors = [f"{e:.1e}{' nats' if self.kind == 'kl' else ''}" if e is not None else ""
                  for e in (self.predicted, self.measured)]  # fmt: skip
        why = "; ".join(dict.fromkeys(self.why))
        return (self.entry.name, self.entry.task, *marks[:3], *errors, *marks[3:], why)

    def attempt(self, path: str, run: Callable[[], Any], want: Any) -> None:
        """Whether `run()` gives what is wanted; a failure's reason is kept."""
        try:
            self.paths[path] = difference(run(), want)
        except Exception as error:
            self.paths[path] = NO
            self.why.append(f"{path}: {reason(error)}")


def trial(entry: Entry, compressed: bool = True) -> Row:
    """Everything there is to know of one entry; without the half at 3x where not `compressed`."""
    row, model = Row(entry), entry.build()
    (probe,) = entry.batches(1, seed=1)
    with torch.no_grad(), fresh_dynamo():
        want = model(**probe)
        if difference(model(**probe), want) != SAME:
            row.paths = dict.fromkeys(PATHS if compressed else PATHS[:3], NO)
            row.why.append("two calls of the model itself differ: it draws at random")
            return row
        try:
            same = fxcompress.compile(model, "1x", example_inputs=entry.batches(1)[0], progress=False)
        except FxcompressError as error:
            row.paths = dict.fromkeys(PATHS if compressed else PATHS[:3], NO)
            row.why.append(reason(error))
            row.attempt("1x backend", lambda: backend(model, budget="1x")(**probe), want)
            return row
        row.attempt("1x graph", lambda: same(**probe), want)
        row.attempt("1x module", lambda: fxcompress.apply(model, same)(**probe), want)
        row.attempt("1x backend", lambda: backend(model, budget="1x")(**probe), want)
    if compressed:
        smaller(row, model, probe)
    return row


def named(name: str) -> Row:
    """`trial` of the entry of that name."""
    (entry,) = (entry for entry in ZOO if entry.name == name)
    return trial(entry)


def smaller(row: Row, model: nn.Module, probe: dict[str, Any]) -> None:
    """The half at 3x."""
    with torch.no_grad(), fresh_dynamo():
        try:
            compiled = fxcompress.compile(
                model, "3x", calibration=row.entry.batches(BATCHES), rewrites=REWRITES, progress=False
            )
        except Exception as error:
            row.paths.update(dict.fromkeys(PATHS[3:], NO))
            row.why.append(f"3x: {reason(error)}")
            return
        report = compiled.report
        row.kind, row.predicted, row.measured = report.kind, report.predicted_error, report.measured_error
        want = compiled(**probe)
        row.attempt("3x loaded", lambda: through_disk(row, compiled)(**probe), want)
        row.attempt("3x module", lambda: fxcompress.apply(model, compiled)(**probe), want)
        row.attempt("3x backend", lambda: backend(model, plan=compiled)(**probe), want)


def through_disk(row: Row, compiled: SignedModule) -> SignedModule:
    """Saved, weighed and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        fxcompress.save(compiled, Path(folder) / "m")
        size = sum(file.stat().st_size for file in (Path(folder) / "m").iterdir())
        row.ratio = compiled.report.original_bytes / size
        return fxcompress.load(Path(folder) / "m")


def backend(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="fxcompress", options={"lower": "eager", **options})


@contextlib.contextmanager
def fresh_dynamo() -> Iterator[None]:
    """Graphs of one entry are not kept for the next."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def difference(output: Any, want: Any) -> str:
    """SAME, or the largest absolute difference of any output."""
    found, wanted = ([t for t in pytree.tree_leaves(o) if isinstance(t, Tensor)] for o in (output, want))
    if [t.shape for t in found] != [t.shape for t in wanted]:
        return f"{len(found)} outputs of {len(wanted)}, or other shapes"
    if all(map(torch.equal, found, wanted)):
        return SAME
    return f"{max(float((a.double() - b.double()).abs().max()) for a, b in zip(found, wanted)):.0e} off"


def reason(error: Exception) -> str:
    """The first sentence, on one line, without paths of this machine or Dynamo's words around it."""
    if isinstance(error, BackendCompilerFailed):
        error = error.inner_exception
    if isinstance(error, CaptureError) and error.__cause__ is not None:
        return f"torch.export: {first_sentence(str(error.__cause__))}"
    return first_sentence(str(error))


def first_sentence(text: str) -> str:
    """On one line, and no end of a table's cell."""
    return " ".join(text.split()).split(". ")[0].rstrip(".").replace("|", "\\|")


def page(rows: Sequence[Row]) -> str:
    """docs/zoo.md, with these rows anew."""
    cells = {**(told() if PAGE.is_file() else {}), **{row.entry.name: row.cells for row in rows}}
    table = ["| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
    table += ["| " + " | ".join(cells[entry.name]) + " |" for entry in ZOO if entry.name in cells]
    return INTRODUCTION + "\n".join(table) + "\n"


def told() -> dict[str, tuple[str, ...]]:
    """The page's rows, in the order of HEADS, by the architecture's name."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [tuple(cell.strip() for cell in line.removeprefix("|").removesuffix("|").split(" | ")) for line in lines]
    return {row[0]: row for row in rows[1:]}


INTRODUCTION = f"""# Architectures

Written by `python benchmarks/zoo.py --write`; `tests/test_zoo.py` holds it to what happens. Every row is a class of
transformers 5 with random weights, small (0.9 to 8 MB), in float32 on a CPU; configs are in `benchmarks/models/zoo.py`.

- 1x: the answers of `fxcompress.compile(model, "1x")`, of `fxcompress.apply(model, compiled)` and of
  `torch.compile(model, backend="fxcompress", options={{"budget": "1x", "lower": "eager"}})` beside the model's own.
- 3x: `fxcompress.compile(model, "3x", calibration=batches, rewrites={REWRITES})`, {BATCHES} batches of random inputs, a
  quarter of each held out; predicted and measured are the error of the outputs on what is held out: relative, or nats
  of KL for logits. The saved folder, every file counted, is a third of the model's bytes. Then the answers of what was
  loaded, of module mode and of the backend, with that plan, beside the compiled graph's.

A measured error keeps the prediction's promise where it is at most a quarter above it, or below {SLIGHT}, where prices
are not corrected. Mixtures of experts may be above it there: a router that rounds otherwise sends some tokens to
another expert, and such jumps are no sum of small errors. All experts of a layer are one matrix and one choice of how
it is kept; low rank and other structures are not offered for it.

Why not at 3x: XLNet multiplies by weights of three dimensions in `einsum`, and WavLM's queries, keys and values have
biases that are cut from a concatenation; both are kept as they are, and the rest alone is not three times smaller. ViLT
draws the patches that it looks at, as many as the data say; nothing of it can be compared, nor exported. Under
torch.compile LLaVA breaks the graph inside its inner model, and the plan is of the outer one.

"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Which architectures work, by which path.")
    parser.add_argument("names", nargs="*", help="of entries; all where none is named")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} anew, or its rows of those named")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    options = parser.parse_args(arguments)
    rows = []
    wanted = [entry.name for entry in ZOO if not options.names or entry.name in options.names]
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for row in pool.map(named, wanted):
            rows.append(row)
            print(f"{len(rows)}: {', '.join(filter(None, row.cells))}", file=sys.stderr)
            if options.write:
                PAGE.parent.mkdir(exist_ok=True)
                PAGE.write_text(page(rows), encoding="utf-8")
    print(tabulate([row.cells for row in rows], headers=HEADS, disable_numparse=True))


if __name__ == "__main__":
    main()
