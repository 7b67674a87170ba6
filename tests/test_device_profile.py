"""Profiles: interpolation against what is known, JSON round trips, refusals by their text."""

import dataclasses
import json

import pytest
import torch

from fxcompress.core.errors import ProfileError
from fxcompress.cost_model.device import DeviceProfile, Grid
from tests.profiling import AXES, by_formula, grid


def test_what_is_a_power_of_its_sizes_is_met_everywhere():
    table = grid(AXES, lambda m, n, k: 1e-9 * m**0.5 * n * k**0.9)
    for m, n, k in ((1, 64, 64), (3, 100, 777), (256, 1024, 1024), (40.5, 64, 1000)):
        assert table.at(m, n, k) == pytest.approx(1e-9 * m**0.5 * n * k**0.9, rel=1e-9)


def test_beyond_the_grid_seconds_grow_by_rate_and_below_it_they_stay():
    table = grid(AXES, lambda m, n, k: 1e-9 * m**0.5 * n * k)
    assert table.at(512, 1024, 1024) == pytest.approx(2 * table.at(256, 1024, 1024))
    assert table.at(256, 4096, 1024) == pytest.approx(4 * table.at(256, 1024, 1024))
    assert table.at(1, 3, 5) == table.at(1, 64, 64)


def test_a_size_that_took_too_long_is_extrapolated_by_rate():
    table = Grid(((1, 4, 16), (64,)), (1.0, 3.0, None))
    assert table.at(16, 64) == pytest.approx(12.0)
    assert table.at(8, 64) == pytest.approx(6.0)


def test_a_grid_that_does_not_fit_its_axes_is_refused():
    with pytest.raises(ValueError, match=r"3 seconds for axes of \[2, 2\] sizes"):
        Grid(((1, 2), (1, 2)), (1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="seconds for axes"):
        Grid(((1, 2),), (1.0, 0.0))


def test_weights_that_do_not_fit_the_cache_are_streamed():
    p = by_formula()
    near, far = (p.bare_seconds("int8", 16, 512, 512, working_set=s) for s in (0, 1e12))
    assert near == pytest.approx(16 * 512 * 512e-12)
    assert far == pytest.approx(2 * near)
    assert p.bare_seconds("int8", 16, 512, 512, working_set=p.caches[1] / 2) == pytest.approx(near)
    assert near < p.bare_seconds("int8", 16, 512, 512, working_set=p.caches[1]) < far


def test_a_small_model_has_its_weights_in_the_second_level_cache():
    p = by_formula()
    _, cached, streamed = p.products["int8"]
    levels = {"int8": (grid(AXES, lambda m, n, k: m * n * k * 5e-13), cached, streamed)}
    p = dataclasses.replace(p, products=levels, overheads={"eager.call": (1e-6, 4e-6, 9e-6)})
    small, large = p.caches[0] / 2, p.caches[0] * 2
    assert p.bare_seconds("int8", 16, 64, 64, working_set=small) == pytest.approx(16 * 64 * 64 * 5e-13)
    assert p.bare_seconds("int8", 16, 64, 64, working_set=large) == pytest.approx(16 * 64 * 64 * 1e-12)
    found = [p.overhead("eager.call", w) for w in (small, p.caches[0], large, 1e12)]
    assert found == pytest.approx([1e-6, 2e-6, 4e-6, 9e-6])


def test_a_product_is_its_call_and_the_passes_around_it():
    p = by_formula()
    eager = p.product_seconds("int8", 16, 512, 256, target="eager")
    assert eager == pytest.approx(16 * 512 * 256e-12 + 16 * (512 + 256) * 1e-12)
    inductor = p.product_seconds("int8", 16, 512, 256, target="inductor")
    assert p.bare_seconds("int8", 16, 512, 256) + 1e-6 < inductor < eager + 1e-6  # one launch, and less between
    assert p.product_seconds("float", 16, 512, 256) == p.bare_seconds("float", 16, 512, 256)


def test_json_is_a_round_trip(tmp_path):
    p = DeviceProfile.from_json(json.loads(by_formula().text()))
    p.save(tmp_path / "p.json")
    assert DeviceProfile.load(tmp_path / "p.json") == p
    assert len((tmp_path / "p.json").read_text().splitlines()) < 80  # a table a line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as a profile"),
        ("[]", "this is no profile of a device"),
        ('{"format": 0}', "this profile has format 0, and 2 is read; run fxcompress profile"),
        ('{"format": 2, "device": "x"}', "this is no profile of a device .*run fxcompress profile"),
    ],
)
def test_what_is_no_profile_is_refused(tmp_path, text, message):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ProfileError, match=message):
        DeviceProfile.load(tmp_path / "p.json")
    with pytest.raises(ProfileError, match=r"absent\.json cannot be read as a profile"):
        DeviceProfile.load(tmp_path / "absent.json")


def test_a_profile_of_another_machine_is_refused():
    p = by_formula()
    p.check_here()
    other = dataclasses.replace(p, device="Z80")
    with pytest.raises(ProfileError, match=r"is of device 'Z80', and here it is .*run fxcompress profile on"):
        other.check_here()
    with pytest.raises(ProfileError, match=rf"of threads 99, and here it is {torch.get_num_threads()}"):
        dataclasses.replace(p, threads=99).check_here()
    with pytest.raises(ProfileError, match=r"of torch '1\.0', and here it is"):
        dataclasses.replace(p, versions={"torch": "1.0"}).check_here()
