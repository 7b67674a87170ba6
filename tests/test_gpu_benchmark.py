"""The GPU benchmark without a GPU: what it counts, what its tables say, what it refuses; a whole run with a timer made
up. No figure here was measured."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

triton = pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import gpu  # noqa: E402
from benchmarks._gpu_families import DENSE, FAMILIES, ROOF, TINYGEMM, Bar  # noqa: E402
from benchmarks._gpu_table import columns, met, ratio, report, roofline, words  # noqa: E402
from fxcompress.codegen.triton import launch  # noqa: E402
from fxcompress.codegen.triton.card import H200  # noqa: E402
from fxcompress.codegen.triton.timing import Timing, _product  # noqa: E402

TOLD = {
    "device": "NVIDIA Example", "driver": "1.2", "torch": "2.13.0", "triton": "3.6.0", "commit": "abc1234",
    "date": "2026-11-21T10:00:00+00:00",
    "copy_bandwidth": 4e12, "matmul_rates": {"bfloat16": 8e14, "int8": 1.6e15}, "left_out": [],
}  # fmt: skip


def row(family="int4 g128", n=8192, k=8192, m=16, seconds=10e-6, spread=0.01, **rivals):
    found = {name.replace("_", " "): {"seconds": s, "spread": 0.01, "captured": True} for name, s in rivals.items()}
    return {
        "family": family, "rows": n, "columns": k, "tokens": m, "seconds": seconds, "spread": spread, "captured": True,
        "bytes": 36_000_000, "flops": 2 * m * n * k, "rate": "bfloat16", "by": "apart", "rivals": found,
    }  # fmt: skip


def test_the_roofline_is_the_larger_of_bytes_and_operations():
    assert roofline(row(m=16), TOLD) == (pytest.approx(9e-6), "memory")
    seconds, bound = roofline(row(m=1024), TOLD)
    assert (seconds, bound) == (pytest.approx(2 * 1024 * 8192**2 / 8e14), "compute")


def test_a_bar_is_a_ratio_to_a_rival_or_a_share_of_the_roofline():
    found = row(seconds=15e-6, cuBLAS_bf16=33e-6, tinygemm=14e-6)
    assert ratio(found, DENSE, TOLD) == pytest.approx(2.2)
    assert met(found, Bar(ROOF, 0.6), TOLD) is True
    assert met(found, Bar(ROOF, 0.61), TOLD) is False
    assert met(found, Bar(TINYGEMM, 1.2), TOLD) is False
    assert met(found, Bar("two products", 1.25), TOLD) is None


def test_as_fast_as_dense_is_judged_within_the_spread():
    bar = Bar(DENSE, 1.0)
    assert met(row(seconds=10e-6, spread=0.01, cuBLAS_bf16=9.81e-6), bar, TOLD) is True
    assert met(row(seconds=10e-6, spread=0.01, cuBLAS_bf16=9.79e-6), bar, TOLD) is False


def test_bars_apply_where_they_are_meant():
    bars = {words(bar): bar for family in FAMILIES for bar in family.bars}
    assert sorted(bars) == sorted([
        "2.2x cuBLAS bf16, 8192 x 8192, M <= 16", "1x tinygemm, 8192 x 8192, M <= 16",
        "60% of the roofline, 8192 x 8192, M <= 16", "1.6x cuBLAS bf16, M <= 16", "1.25x two products, M <= 16",
        "2x cuBLAS bf16, M <= 16", "1.5x cuBLAS bf16, M >= 256",
    ])  # fmt: skip
    wide = bars["2.2x cuBLAS bf16, 8192 x 8192, M <= 16"]
    assert [wide.applies(s, m) for s, m in (((8192, 8192), 16), ((4096, 4096), 16), ((8192, 8192), 17))] == [1, 0, 0]


def test_the_tables_of_a_file(golden, tmp_path, capsys):
    rows = [
        row(m=1, seconds=12e-6, cuBLAS_bf16=36e-6, tinygemm=15e-6),
        row(m=16, seconds=18e-6, cuBLAS_bf16=36e-6, tinygemm=17e-6),
        {**row("int8", m=1, seconds=24e-6, cuBLAS_bf16=36e-6), "captured": False},
        {"family": "2:4", "rows": 8192, "columns": 8192, "tokens": 1, "rivals": {}, "error": "OutOfResources: shared"},
    ]
    rows[0]["rivals"]["max-autotune"] = {"seconds": 30e-6, "spread": 0.0, "captured": True}
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({**TOLD, "rows": rows, "left_out": ["4096 x 14336, M = 1024"]}))
    assert gpu.main(["--table", str(file)]) == 0
    golden(capsys.readouterr().out)


def test_without_a_gpu_it_says_what_to_do(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "benchmarks/gpu.py: measuring kernels needs a CUDA GPU, and torch" in said.err
    assert "run it on the machine that will run the model" in said.err


def fake(calls):
    """Calls each once; a microsecond for each copy."""
    for call in calls:
        call()
    return Timing(1e-6 * len(calls), 0.0, True)


def bench(seconds=1e9):
    return gpu.Bench("cpu", H200, 1000, seconds, fake)


@pytest.fixture
def two_sizes(monkeypatch):
    monkeypatch.setattr(gpu, "TOKENS", (1, 20))
    rivals = {name: rival for family in FAMILIES for name, rival in family.rivals}
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", lambda codes, _: codes)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", lambda x, packed, group, marks: None)
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    assert set(rivals) == {"tinygemm", "two products"}


def test_a_whole_run_with_a_timer_made_up(two_sizes, tmp_path, monkeypatch):
    told = gpu.run(bench(), shapes=((256, 256),), large=32)
    assert [row.get("error") for row in told["rows"]] == [None] * 2 * len(FAMILIES)
    assert told["matmul_rates"].keys() == {"bfloat16", "int8", "float8_e4m3fn"}
    assert told["left_out"] == []
    four, low = (next(r for r in told["rows"] if r["family"] == name) for name in ("int4 g128", "low rank n/4"))
    assert set(four["rivals"]) == {DENSE, "tinygemm", "max-autotune"}
    assert low["rivals"].keys() == {DENSE, "two products", "max-autotune"}
    assert four["bytes"] == 256 * 128 + 256 * 2 + 256 + 8 + 2 * 2 * 256
    assert low["flops"] == 2 * 64 * 512
    told = json.loads(json.dumps(told))
    assert "bar" in report(told)
    assert gpu.write(told, tmp_path).name == "gpu_NVIDIA_H200.json"


def test_what_there_is_no_time_for_is_named(two_sizes):
    told = gpu.run(bench(seconds=0), shapes=((256, 256),), large=32)
    assert told["rows"] == []
    assert told["left_out"] == ["256 x 256, M = 1", "256 x 256, M = 20"]
    assert "not measured" in report(told)


def test_a_family_that_fails_is_a_row(two_sizes):
    broken = gpu.Family("broken", lambda rows, columns: "linear(x, softplus(3))")
    told = gpu.run(bench(), (broken, FAMILIES[0]), ((64, 64),), large=32)
    assert "broken, 64 x 64, M = 1: " in report(told)
    assert [("error" in row) for row in told["rows"]] == [True, False] * 2


def test_a_family_that_falls_back_to_plain_torch_is_not_timed_as_a_kernel(two_sizes, monkeypatch):
    def fused(x, tensors, extras, text, name):
        launch.warn(name, "out of shared memory")

    monkeypatch.setattr(gpu, "fused", fused)
    told = gpu.run(bench(), FAMILIES[:1], ((64, 64),), large=32)
    said = "dense 64 x 64 M = 1 runs without a kernel, as plain PyTorch: out of shared memory."
    assert told["rows"][0]["error"] == said
    assert len(told["rows"]) == 2


def test_a_card_that_is_lost_ends_in_a_file(two_sizes, monkeypatch):
    def lost(calls):
        raise RuntimeError("CUDA error: an illegal memory access")

    broken = bench()
    monkeypatch.setattr(gpu.timing, "copy_bandwidth", lambda *_: 1e12)
    monkeypatch.setattr(gpu.timing, "matmul_rate", lambda *_: 1e15)
    broken.timer = lost
    told = gpu.run(broken, shapes=((64, 64),), large=32)
    assert told["rows"] == []
    assert told["left_out"][0] == "64 x 64, M = 1 (RuntimeError: CUDA error: an illegal memory access)"


def test_the_calls_of_rivals_and_rates_fit_their_ops():
    """Shapes and dtypes, as torch checks them for tensors that are not there."""
    with FakeTensorMode():
        x = torch.empty(16, 256, dtype=torch.bfloat16, device="cuda")
        for name, rival in [pair for family in FAMILIES for pair in family.rivals]:
            own = [torch.empty(*shape, dtype=x.dtype, device="cuda") for shape in ((64, 256), (512, 64))]
            tensors, call = rival(512, 256, x, own)
            assert call(tensors).shape == (16, 512), name
        a, b = torch.empty(64, 64, device="cuda"), torch.empty(64, 64, device="cuda")
        for dtype in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
            assert _product(a, b, dtype)().shape == (64, 64)


def test_columns_are_aligned():
    assert columns([["a", "bb"], ["ccc", ""]]) == "a    bb\n---  --\nccc"
