"""Every kernel the generator can emit compiles for GPUs that are not here, and is what it should be."""

import json
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from fxcompress import cli  # noqa: E402
from fxcompress.codegen.spec import parse  # noqa: E402
from fxcompress.codegen.triton import catalogue  # noqa: E402
from fxcompress.codegen.triton.ahead import compile_ahead  # noqa: E402
from fxcompress.codegen.triton.catalogue import ENTRIES, compile_all, table  # noqa: E402
from fxcompress.codegen.triton.generate import generate  # noqa: E402
from fxcompress.codegen.triton.issue import _main_loop  # noqa: E402
from fxcompress.codegen.triton.kernel import Config  # noqa: E402
from fxcompress.codegen.triton.low_rank import MOST  # noqa: E402


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """All of the catalogue on sm_90, compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXCOMPRESS_CACHE", str(tmp_path_factory.mktemp("kernels")))
        yield list(compile_all(90))


def test_on_sm_90_nothing_is_at_fault_and_every_product_is_on_its_tensor_cores(rows):
    assert {(row.entry.name, row.config) for row in rows} == {(e.name, config) for e in ENTRIES for config in e.configs}
    assert [(row.entry.name, row.config, row.faults) for row in rows if row.faults] == []
    # Rows of 16 are too few for wgmma, which takes 64.
    products = [row for row in rows if row.launch.multiplies]
    assert all(row.report.instructions["mma" if "tiles" in row.entry.name else "wgmma"] for row in products)


def test_weights_arrive_by_asynchronous_copies(rows):
    # The first factor of the train has the columns of a single step: there is no next one to load ahead.
    looped = [row for row in rows if row.launch.multiplies and row.launch.form != "fused_train_inner"]
    assert all(row.report.instructions["cp.async"] for row in looped)


def test_unpacking_stays_on_the_fast_path(rows):
    """Integer instructions a weight, so that a refactoring cannot lose it: 1.7 for 4 bits in groups of 128."""
    integer = {(row.entry.name, row.config): row.mix.integer for row in rows if row.launch.multiplies}
    assert integer["int4 g128", catalogue.DECODE] <= 1.7
    assert integer["int4 g64", catalogue.DECODE] <= 2.0
    assert integer["int4 g64", catalogue.PREFILL] <= 2.5
    assert integer["float8", catalogue.DECODE] <= 2.0
    assert integer["rms norm, int4 g64", catalogue.DECODE] <= 3
    assert integer["dense", catalogue.DECODE] <= 0.5
    assert integer["mask", catalogue.DECODE] <= 8
    assert integer["tiles of 16", catalogue.TILES] <= 1


def test_sums_of_8_bit_floats_leave_the_tensor_cores_at_every_step(rows):
    wanted = ("float8 x float8", catalogue.DECODE, True)
    (report,) = [row.report for row in rows if (row.entry.name, row.config, row.launch.multiplies) == wanted]
    assert "QGMMA" in report.sass
    # 16 x 128 sums of 128 threads.
    assert sum("FADD" in line for line in _main_loop(report.sass)) >= 16


def test_the_table_has_a_line_for_each(rows):
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert lines[0].split()[0] == "kernel"


@pytest.mark.parametrize("config", [catalogue.DECODE, catalogue.SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("name", ["int4 g64", "layer norm, int4 g64"])
def test_a_single_token_is_a_constant_to_triton(name, config, tmp_path, monkeypatch):
    """At a launch Triton makes every size that is 1 a constexpr, which has no methods of a tensor."""
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path))
    (product,) = (entry.product for entry in ENTRIES if entry.name == name)
    kernel = generate(parse(product), torch.bfloat16)
    signature = {name: kind for name, kind in kernel.signature(config).items() if name != "M"}
    report = compile_ahead(kernel.function(config), signature, {**kernel.constants(config), "M": 1}, 90, config.warps)
    assert report.faults(("wgmma",)) == []


def test_the_largest_rank_that_is_emitted_fits_an_h100(tmp_path, monkeypatch):
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path))
    product = f"low_rank_linear(x, bfloat16[{MOST}, 4096], bfloat16[4096, {MOST}])"
    configs = (Config(64, 128, 1, 8, 2), Config(16, 128, 4, 4, 3))
    monkeypatch.setattr(catalogue, "ENTRIES", (catalogue.Entry("low rank", product, 16, 64, configs),))
    assert [row.faults for row in compile_all(90)] == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 100])
def test_on_other_cards_too(arch, tmp_path, monkeypatch):
    """Every entry and every config; each with each takes minutes a card (`fxcompress kernels --arch 80`)."""
    some, seen = [], set()
    for at, entry in enumerate(ENTRIES):
        configs = [c for c in entry.configs if c not in seen] or [entry.configs[(at + arch) % len(entry.configs)]]
        some.append(replace(entry, configs=tuple(configs)))
        seen.update(configs)
    monkeypatch.setattr(catalogue, "ENTRIES", tuple(some))
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path))
    assert [(row.entry.name, row.config, row.faults) for row in compile_all(arch) if row.faults] == []


def test_the_command_prints_them_and_fails_where_one_is_at_fault(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(catalogue, "ENTRIES", ENTRIES[:1])
    assert cli.main(["kernels", "--json"]) == 0
    assert [kernel["kernel"] for kernel in json.loads(capsys.readouterr().out)["kernels"]] == ["dense"] * 5
    monkeypatch.setattr(catalogue.Row, "faults", ["spills 16 bytes"])
    assert cli.main(["kernels"]) == 1
    said = capsys.readouterr()
    assert said.out.count("spills 16 bytes") == 5
    assert "5 of 5 kernels are at fault: dense spills 16 bytes" in said.err


def test_a_card_without_8_bit_floats_leaves_their_products_out(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(catalogue, "ENTRIES", (ENTRIES[0], ENTRIES[-1]))
    assert cli.main(["kernels", "--arch", "80"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "left out: float8 x float8 needs sm_89"
    assert [line.split()[0] for line in said[2:-1]] == ["dense"] * 5
    assert catalogue.left_out(89) == []


def test_an_unknown_card_is_named(capsys):
    assert cli.main(["kernels", "--arch", "70"]) == 1
    wanted = "--arch 70: kernels can be compiled for 80, 86, 89, 90, 100, 120 (90 is sm_90, an H100 or H200)."
    assert wanted in capsys.readouterr().err
