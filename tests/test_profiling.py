"""Profiling with tiny grids: what is measured, where it is kept, what stays untouched; no speed is asserted."""

import dataclasses
import json
import math

import pytest
import torch

import fxcompress
from fxcompress import cli, profiling
from fxcompress.codegen.cpu import measure
from fxcompress.cost_model.device import PRODUCTS
from tests.profiling import by_formula

TINY = measure.Sizes(
    tokens=(1, 2), features=(64, 128), rows=(2, 4), columns=(64, 128), looped=(2, 4), widths=(64, 96),
    heads=(2, 4), positions=(2, 4),
    head=(8, 16),
)  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_a_profile_is_measured_kept_and_found_again(cache, monkeypatch):
    monkeypatch.setattr(profiling, "CHECKS", 6)
    rng, threads = torch.get_rng_state(), torch.get_num_threads()
    made = profiling.profile(progress=False, sizes=TINY)
    assert torch.equal(rng, torch.get_rng_state())
    assert (threads, torch.is_grad_enabled()) == (torch.get_num_threads(), True)
    assert set(made.products) >= {"float", "bf16", "int8_weight", "int4_weight"}
    assert all(math.isfinite(s) and s > 0 for pair in made.products.values() for g in pair for s in g.seconds if s)
    assert 0 < made.error[0] <= made.error[1]
    assert profiling.cached() == fxcompress.DeviceProfile.from_json(made.to_json())
    assert "int8_weight" in profiling.table(made)


def test_the_kept_profile_is_found_and_a_damaged_one_is_named(cache, caplog):
    path = profiling.cached_path()
    path.parent.mkdir(parents=True)
    path.write_text(by_formula().text())
    assert profiling.here().device == by_formula().device
    path.write_text("{")
    profiling.cached()
    assert f"{path} is not used" in caplog.text
    path.write_text(dataclasses.replace(by_formula(), device="Z80").text())
    profiling.cached()
    assert "the profile is of device 'Z80'" in caplog.text


def test_shipped_profiles_are_whole():
    for path in profiling.SHIPPED.glob("*.json"):
        shipped = fxcompress.DeviceProfile.load(path)
        assert path.stem == shipped.name
        assert set(shipped.products) >= set(PRODUCTS)


def test_the_command_prints_a_table_or_json(cache, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(profiling, "profile", lambda progress: by_formula())
    assert cli.main(["profile", "--quiet", "--out", str(tmp_path / "p.json")]) == 0
    told = capsys.readouterr().out
    assert "own error, products of sizes not measured: median 5%, 90th percentile 20%" in told
    assert f"written to {tmp_path / 'p.json'}" in told
    assert fxcompress.DeviceProfile.load(tmp_path / "p.json").threads == torch.get_num_threads()
    assert cli.main(["profile", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == 2


def test_a_measured_product_is_the_product():
    """What is timed multiplies what it is said to: x W^T within the rounding of its dtype."""
    torch.manual_seed(0)
    weight = torch.randn(64, 128) / 3
    for name in measure.kernels():
        dtype, pack, call = measure.KERNELS[name]
        packed = pack(weight)
        x = torch.randint(-3, 4, (5, 128)).to(dtype)
        meant = {"int8": (weight * 40).clamp(-127, 127).to(torch.int8), "int8_weight": packed[0],
                 "int4_weight": (weight * 4 + 8).clamp(0, 15).int() - 8}.get(name, weight)  # fmt: skip
        exact = x.double() @ meant.double().T
        # sums of 128 terms; operands and result rounded to bf16, 2^-9 each, where the kernel's dtype is that
        slack = 0 if name == "int8" else 3 * 2**-9 if dtype == torch.bfloat16 else 128 * 2**-24
        bound = slack * (x.double().abs() @ meant.double().abs().T) + 1e-9
        assert ((call(x, *packed).double() - exact).abs() <= bound).all(), name
