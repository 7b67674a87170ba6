"""The checks of tests/gpu and the benchmark, here: the same code on small weights, interpreted, with a timer made up.

What only a GPU has (captures, streams, events) is replaced in tests/gpu/ground.py, and tested in tests/test_timing.py.
"""

import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from benchmarks._constants import constants_of  # noqa: E402
from fxcompress.codegen.ops.fused import evaluate  # noqa: E402
from fxcompress.codegen.spec import parse  # noqa: E402
from fxcompress.codegen.triton import catalogue  # noqa: E402
from fxcompress.codegen.triton.interpreter import interpreter  # noqa: E402
from tests.gpu import __main__ as runner  # noqa: E402
from tests.gpu import checks  # noqa: E402
from tests.gpu.cases import Case, cases  # noqa: E402
from tests.gpu.ground import dry  # noqa: E402

SIZES = "SIZE, RANK = 4096, 128"


def small_catalogue():
    """The entries at 512 columns and rows, where they can be so small."""
    text = Path(catalogue.__file__).read_text(encoding="utf-8")
    assert SIZES in text
    module = types.ModuleType("small_catalogue")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(text.replace(SIZES, "SIZE, RANK = 512, 32"), vars(module))
    return [entry for entry in module.ENTRIES if entry.name not in ("blocks", "Monarch int4", "tensor train")]


def chosen():
    """Every small one, a config of every entry, every kind of check of one of them, and a model."""
    entries = [replace(entry, configs=entry.configs[:1]) for entry in small_catalogue()]
    for case in cases(entries):
        some = case.name.startswith(("small ", "config ")) or case.name.endswith((" dense", "int8_dynamic"))
        if some and "int2" not in case.name:
            yield case


def test_a_result_that_is_wrong_anywhere_is_found():
    """One number off by a hundredth of the largest; one that is not written; two rows that changed places."""
    for product in ("linear(x, bfloat16[48, 64])", "low_rank_linear(x, bfloat16[16, 64], bfloat16[48, 16])"):
        example = checks.Example(product, 5, dry())
        with interpreter():
            made = example.run(dry())
        example.check(made)
        for damage in (lambda y: y[3, 7].add_(0.02 * y.abs().max()), lambda y: y[4, 40].fill_(float("nan")),
                       lambda y: y[:2].copy_(y[:2].flip(0))):  # fmt: skip
            damage(wrong := made.clone())
            with pytest.raises(AssertionError, match=r"too much, where|not finite"):
                example.check(wrong)


def test_the_runner_without_pytest_counts_and_fails(capsys):
    def fails(ground):
        raise ValueError("of no use\nat all")

    told = [Case("a", lambda ground: None), Case("b", fails), Case("c", fails, ("scipy",))]
    assert runner.run(told, dry()) == 1
    said = capsys.readouterr()
    assert "FAILED    b: ValueError: of no use\n" in said.out
    assert "left out  c: not installed: scipy" in said.out
    assert "1 passed, 1 failed, 1 left out\n    failed: b" in said.out
    assert "Traceback" in said.err
    assert runner.run(told[:1], dry()) == 0
    assert runner.run([], dry()) == 1


def test_without_a_gpu_the_runner_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runner.main([]) == 1
    assert "sees no CUDA GPU; nothing was run" in capsys.readouterr().err


def test_memory_is_poisoned_before_a_kernel_writes_it():
    with checks.poisoned():
        made = torch.empty(1).new_empty(2, 3)
        codes = torch.empty(1).new_empty(2, dtype=torch.int8)
    assert bool(made.isnan().all())
    assert codes.tolist() == [77, 77]
    assert "new_empty" not in vars(torch.Tensor)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))


@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.name) for entry in catalogue.ENTRIES])
def test_constants_made_up_for_a_spec_are_fit_for_it(entry):
    """At the sizes that a GPU gets: finite results of order one."""
    spec = parse(entry.product)
    x = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = evaluate(spec, x, constants_of(spec, "cpu"), [])[0].float()
    assert bool(y.isfinite().all())
    assert 0.02 < float(y.std()) < 20


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in chosen()])
def test_every_check_holds_where_kernels_are_interpreted(case):
    with interpreter():
        case.run(dry())
