"""Block scales against one scale for the whole tensor, on real weights and on heavy tails."""

import pytest

from benchmarks import block_scales
from benchmarks.models import minilm


def test_block_scales_beat_a_scale_for_the_whole_tensor_on_real_weights(data):
    model = data(minilm.model)
    layer = model.encoder.layer[0]
    matrices = (layer.attention.self.query, layer.attention.output.dense, layer.intermediate.dense, layer.output.dense)
    for linear in matrices:
        for bits in (4, 8):
            for power_of_two in (False, True):
                tensor, row, *blocks = (
                    block_scales.by_range(linear.weight.detach(), bits, block, power_of_two)
                    for block in (None, 0, 64, 32)
                )
                assert blocks[1] < blocks[0] < row < tensor
                assert blocks[0] < 0.7 * tensor  # measured: 0.02 to 0.6 of it


def test_block_scales_on_heavy_tails_are_near_the_published_design_figures():
    name, weight = next(block_scales.weights())
    assert name == "Student t4"
    figures = ((64, True, 0.0135, 0.231), (64, False, 0.0091, 0.160), (32, True, 0.0111, 0.193))
    for block, power_of_two, int8, int4 in figures:
        # another draw of the same distribution: the sum of a million weights is settled to a few per cent
        assert block_scales.by_range(weight, 8, block, power_of_two) == pytest.approx(int8, rel=0.05)
        assert block_scales.by_range(weight, 4, block, power_of_two) == pytest.approx(int4, rel=0.05)
