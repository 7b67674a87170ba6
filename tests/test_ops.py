"""The ops: what torch asks of a custom op, fake shapes equal to real ones, ids checked."""

import pytest
import torch

from fxcompress.codegen.ops import OPS
from fxcompress.core.metric import Metric
from fxcompress.passes.quantize import Quantize
from fxcompress.passes.quantize_rows import TIERS, QuantizeRows

COLUMNS, ROWS = 21, 12
IDS = torch.tensor([[0, 11, 3], [3, 3, 7]])


def quantized(bits=4, group=0):
    generator = torch.Generator().manual_seed(0)
    setting = Quantize(bits, group)
    encoded = setting.encode(torch.randn(ROWS, COLUMNS, generator=generator), Metric())
    return [encoded[k] for k in Quantize.keys], setting.constants(torch.empty(ROWS, COLUMNS))


def tiers(counts=(3, 4, 0, 5)):
    generator = torch.Generator().manual_seed(0)
    encoded = QuantizeRows(*counts).encode(torch.randn(ROWS, COLUMNS, generator=generator), Metric())
    lists = [[encoded[f"{part}{t.bits}"] for t in TIERS] for part in ("codes", "scales", "zeros", "grid")]
    return (encoded["index"], *lists, [t.bits for t in TIERS], [0] * len(TIERS), COLUMNS, torch.float32)


def low_rank(bias, tokens=(2, 5), grad=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*tokens, COLUMNS, generator=generator)
    v, u = torch.randn(4, COLUMNS, generator=generator), torch.randn(ROWS, 4, generator=generator)
    made = (x, v, u, torch.randn(ROWS, generator=generator) if bias else None)
    return tuple(t.requires_grad_(grad) if t is not None else t for t in made)


SAMPLES = {
    "fxcompress::dequantize": [lambda bits=bits: (*quantized(bits)[0], *quantized(bits)[1]) for bits in (2, 3, 4, 8)],
    "fxcompress::quantized_embedding": [
        lambda: (IDS, *quantized()[0], *quantized()[1]),
        lambda: (IDS[0, 0], *quantized(3)[0], *quantized(3)[1]),
        lambda: (IDS[:, :0], *quantized(8)[0], *quantized(8)[1]),
        lambda: (IDS.int(), *quantized(2)[0], *quantized(2)[1]),
    ],
    "fxcompress::quantized_rows_embedding": [
        lambda: (IDS, *tiers()),
        lambda: (IDS[0], *tiers((0, 0, 0, 12))),
        lambda: (IDS[:, :0], *tiers()),
        lambda: (IDS.int(), *tiers()),
    ],
    "fxcompress::low_rank_linear": [
        lambda: low_rank(bias=True),
        lambda: low_rank(bias=False),
        lambda: low_rank(bias=True, tokens=(3,)),
        lambda: low_rank(bias=True, tokens=()),
    ],
}
CASES = [
    pytest.param(op, make, id=f"{op._name}-{i}") for op in OPS for i, make in enumerate(SAMPLES.get(op._qualname, ()))
]


def test_no_op_shares_a_name():
    names = [op._qualname for op in OPS]
    assert len(set(names)) == len(names)
    assert set(SAMPLES) < set(names)  # the others: tests/test_contract.py, test_linformer_op.py, test_fuse.py


@pytest.mark.parametrize(("op", "make"), CASES)
def test_torch_accepts_the_op(op, make):
    # All of opcheck's tests: schema, autograd registration, fake tensors, and AOT dispatch with dynamic shapes.
    assert set(torch.library.opcheck(op, make()).values()) == {"SUCCESS"}


@pytest.mark.parametrize(("op", "make"), CASES)
def test_the_fake_answer_has_the_shape_dtype_and_strides_of_the_real_one(op, make):
    args = make()
    real = op(*args)
    on_meta = torch.utils._pytree.tree_map(lambda a: a.to("meta") if isinstance(a, torch.Tensor) else a, args)
    fake = op(*on_meta)
    assert fake.device.type == "meta"
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_quantized_lookup_is_the_row_of_the_dequantized_table(bits):
    tensors, constants = quantized(bits)
    table = torch.ops.fxcompress.dequantize(*tensors, *constants)
    assert torch.equal(torch.ops.fxcompress.quantized_embedding(IDS, *tensors, *constants), table[IDS])


def test_a_lookup_in_tiers_is_the_row_of_its_own_tier():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(ROWS, COLUMNS, generator=generator)
    counts = (3, 4, 0, 5)
    by_size = table.square().sum(1).argsort(descending=True, stable=True)  # no metric: the largest rows come first
    want = torch.empty_like(table)
    for tier, mine in zip(TIERS, by_size.split(counts)):
        if len(mine):
            mine = mine.sort().values
            want[mine] = tier.decode(tier.encode(table, Metric()), table)[mine]
    got = torch.ops.fxcompress.quantized_rows_embedding(IDS, *tiers(counts))
    assert torch.equal(got, want[IDS])


@pytest.mark.parametrize("bad", [ROWS, ROWS + 100, -1])
@pytest.mark.parametrize("make", [lambda: [*quantized()[0], *quantized()[1]], tiers], ids=["plain", "tiers"])
def test_an_id_outside_the_vocabulary_is_an_index_error(make, bad):
    args = make()
    name = "quantized_rows_embedding" if isinstance(args[1], list) else "quantized_embedding"
    op = getattr(torch.ops.fxcompress, name)
    assert op(IDS, *args).shape == (2, 3, COLUMNS)
    with pytest.raises(IndexError, match=r"out of (range|bounds)"):
        op(torch.tensor([0, bad]), *args)


def test_an_index_of_more_than_half_a_16_bit_range_is_read_unsigned():
    rows = 40_000  # above 2^15
    table = torch.arange(rows, dtype=torch.float32).unsqueeze(1).expand(rows, 2).contiguous() + 1
    encoded = QuantizeRows(rows, 0, 0, 0).encode(table, Metric())
    assert encoded["index"].dtype == torch.int16
    got = QuantizeRows(rows, 0, 0, 0).decode(encoded, table)
    # A row holds one number twice; a scale is off by half a step of its logarithm (16 octaves in 255 steps),
    # so is the row, besides half a code of 1/255 of its range.
    assert float(((got - table).abs() / table).max()) < 2 ** (8 / 255) - 1 + 1 / 255


def test_low_rank_linear_is_the_product_of_its_factors():
    x, v, u, bias = low_rank(bias=True)
    want = x.double() @ (u.double() @ v.double()).T + bias.double()
    got = torch.ops.fxcompress.low_rank_linear(x, v, u, bias)
    size = x.abs() @ v.abs().T @ u.abs().T + bias.abs()  # what the roundings are relative to
    # 21 + 4 products and sums, each off by 2^-24 of it at most.
    assert bool(((got - want).abs() <= (COLUMNS + 4 + 2) * 2**-24 * size).all())
