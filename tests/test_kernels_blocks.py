"""Block low rank and Monarch as generated kernels, interpreted, against the bodies of the ops in float64."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from fxcompress.codegen.ops.block_low_rank_linear import in_order, inner, stacked  # noqa: E402
from fxcompress.codegen.ops.fused import evaluate  # noqa: E402
from fxcompress.codegen.ops.monarch_linear import strided  # noqa: E402
from fxcompress.codegen.spec import parse  # noqa: E402
from fxcompress.codegen.triton.generate import generate  # noqa: E402
from fxcompress.codegen.triton.interpreter import interpreter  # noqa: E402
from fxcompress.codegen.triton.kernel import Config  # noqa: E402
from fxcompress.core.errors import SpecError  # noqa: E402
from tests.test_kernels import HALVES, dense, float8, normal, quantized, two_of_four, unpacked  # noqa: E402

OPS = ["block_low_rank_linear", "monarch_linear"]
TAIL = " | gelu(_) | add(_, extra[0])"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))


def check(op, v, u, blocks, tokens, dtype, tail=TAIL, tile=32):
    """The kernel against the body in float64, on the very numbers; v and u as `dense` and the others give them."""
    rank, rows = (int(weight.split("[")[1].split(",")[0]) for weight, _ in (v, u))
    columns = unpacked_columns(v[0])
    name = str(dtype)[6:]
    x, bias = normal(tokens, columns, seed=1).to(dtype), normal(rows, seed=3).to(dtype)
    extras = [normal(tokens, rows, seed=4).to(dtype)] if "extra" in tail else []
    spec = parse(f"{op}(x, {v[0]}, {u[0]}, blocks={blocks}, bias={name}[{rows}]){tail}")
    kernel = generate(spec, dtype, ("full",) * len(extras))
    tensors = [*v[1], *u[1], bias]
    with interpreter():
        (made,) = kernel(x, kernel.prepare(tensors), extras, Config(16, tile))
    doubled = [t.double() if t.dtype == dtype else t for t in tensors]
    exact = parse(str(spec).replace(name, "float64"))
    (want,) = evaluate(exact, x.double(), doubled, [e.double() for e in extras])
    # Roundings: z to dtype, of relative size eps / 2 each, which |U| adds up (`middle`); float32 sums of columns /
    # blocks and of rank products, whose sizes add up to `size`, once while z is made and once after it; a GELU is
    # nowhere steeper than 1.13; the result to dtype.
    w_v, w_u = unpacked(*v, columns, dtype), unpacked(*u, rank, dtype)
    split, join = (strided, (1, 2, 0)) if op == "monarch_linear" else (stacked, (1, 0, 2))
    parts = split(w_u, blocks).abs().mT
    middle = in_order(torch.bmm(inner(x.double(), w_v, blocks).abs(), parts).permute(join))
    size = in_order(torch.bmm(inner(x.double().abs(), w_v.abs(), blocks), parts).permute(join))
    single = (columns // blocks + rank) * 2.0**-24 * (size + 1)
    room = torch.finfo(dtype).eps / 2 * (want.abs() + 1.13 * middle) + 1.13 * 2 * single + 2.0**-22
    assert made.shape == want.shape
    worst = float(((made.double() - want).abs() - room).max()) if tokens else 0.0
    assert worst <= 0, f"{worst:.3g} too much, where {float(room.max()):.3g} is allowed"


def unpacked_columns(weight):
    """Columns of a weight as a spec writes it."""
    (loader,) = (loader for _, loader in generate(parse(f"linear(x, {weight})"), torch.float32).loaders)
    return loader.columns


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("op", OPS)
def test_blocks_of_any_size(op, tokens, dtype):
    """Chunks of 30 columns and blocks of 21 outputs fill no tile, ranks of 7 no multiple of one."""
    check(op, dense(3 * 7, 90, dtype), dense(63, 3 * 7, dtype), 3, tokens, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kept", ["groups", "row", "float8", "2:4", "V alone", "U alone"])
@pytest.mark.parametrize("op", OPS)
def test_every_way_of_keeping_the_weights(op, kept, dtype):
    blocks, rank, rows, columns, tokens = 2, 64, 80, 256, 5
    v, u = {
        "groups": lambda: (quantized(rank, columns, dtype, 4, 64), quantized(rows, rank, dtype, 4, 32)),
        "row": lambda: (quantized(rank, columns, dtype, 8, 0), quantized(rows, rank, dtype, 8, 0)),
        "float8": lambda: (float8(rank, columns, dtype), float8(rows, rank, dtype)),
        "2:4": lambda: (two_of_four(rank, columns, dtype), two_of_four(rows, rank, dtype)),
        "V alone": lambda: (quantized(rank, columns, dtype, 2, 32), dense(rows, rank, dtype)),
        "U alone": lambda: (dense(rank, columns, dtype), quantized(rows, rank, dtype, 3, 32)),
    }[kept]()  # fmt: skip
    check(op, v, u, blocks, tokens, dtype, " | silu(_)")


@pytest.mark.parametrize("op", OPS)
def test_many_blocks_and_large_tiles(op):
    weight = dense(128, 128, torch.float16)
    check(op, weight, weight, 8, 20, torch.float16, "", 128)


def test_columns_in_whole_steps_whose_chunks_are_not():
    """The last chunk of 32 starts where 32 columns are left of the 64 of a step: what lies behind is not read."""
    columns = 128
    kernel = generate(parse(f"monarch_linear(x, float32[16, {columns}], float32[8, 16], blocks=4)"), torch.float32)
    assert f"< {columns})[None, :]" in kernel.source


@pytest.mark.parametrize("op", OPS)
def test_no_tokens_give_an_empty_result_without_a_launch(op):
    kernel = generate(parse(f"{op}(x, float16[4, 32], float16[8, 4], blocks=2)"), torch.float16)
    (made,) = kernel(torch.empty(2, 0, 32).half(), [normal(4, 32).half(), normal(8, 4).half()], [])
    assert (made.shape, made.dtype) == ((2, 0, 8), torch.float16)


@pytest.mark.parametrize(("bits", "group", "step"), [(8, 0, 64), (4, 64, 128), (3, 32, 160)])
def test_chunks_that_are_no_whole_steps_of_words_are_refused(bits, group, step):
    v, _ = quantized(8, 192, torch.float16, bits, group)
    with pytest.raises(SpecError, match=f"chunks of 96 columns cannot be read in steps of {step} by Quantized; store"):
        generate(parse(f"block_low_rank_linear(x, {v}, float16[16, 8], blocks=2)"), torch.float16)


def test_a_storage_without_a_loader_is_named():
    v = "unmask(uint8[8, 1], float32[8, 4], columns=8, tile=1)"
    with pytest.raises(SpecError, match="chunks of 4 columns cannot be read in steps of 128 by Masked"):
        generate(parse(f"monarch_linear(x, {v}, float32[8, 8], blocks=2)"), torch.float32)
