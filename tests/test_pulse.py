"""How fast a machine is now, against what it was; no speed is asserted."""

import pytest

from fxcompress.codegen.cpu.pulse import Beat, slowdown, typical


def test_a_slower_machine_is_slower_by_the_mean_factor_of_what_both_know():
    then = {"product": 1e-5, "loop": 2e-6, "int8": 1e-6}
    assert slowdown(then, then) == pytest.approx(1)
    assert slowdown({"product": 2e-5, "loop": 4e-6}, then) == pytest.approx(2)
    assert slowdown({"product": 4e-5, "loop": 2e-6}, then) == pytest.approx(2)  # geometric
    assert slowdown({"other": 1.0}, then) == 1


def test_the_typical_pulse_is_each_kernels_lower_quartile():
    pulses = [{"product": s, "loop": 10 - s} for s in (4.0, 1.0, 3.0, 2.0, 9.0)]
    assert typical(pulses) == {"product": 2.0, "loop": 6.0}


def test_a_beat_times_its_kernels():
    found = Beat()()
    assert {"product", "loop", "weights", "calls"} <= set(found)
    assert all(seconds > 0 for seconds in found.values())
