"""Generated kernels, interpreted, against the body of the op in float64."""

import itertools

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from fxcompress.codegen.ops.fused import evaluate  # noqa: E402
from fxcompress.codegen.ops.unmask import bits_of, mask_bytes  # noqa: E402
from fxcompress.codegen.ops.unmask_2_4 import patterns_of  # noqa: E402
from fxcompress.codegen.spec import parse  # noqa: E402
from fxcompress.codegen.triton.build import load_source  # noqa: E402
from fxcompress.codegen.triton.generate import generate, kind_of  # noqa: E402
from fxcompress.codegen.triton.interpreter import interpreter  # noqa: E402
from fxcompress.codegen.triton.kernel import Config  # noqa: E402
from fxcompress.core.errors import SpecError  # noqa: E402
from fxcompress.core.metric import Metric  # noqa: E402
from fxcompress.passes.float8 import Float8  # noqa: E402
from fxcompress.passes.quantize import Quantize  # noqa: E402

HALVES = [torch.float16, torch.bfloat16]
BITS = [2, 3, 4, 8]
TAIL = " | gelu(_, approximate='tanh') | add(_, extra[0]) | mul(_, extra[1])"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(rows, columns, dtype):
    """-> (the weight as a spec writes it, its constants)."""
    weight = (normal(rows, columns) / columns**0.5).to(dtype)
    return f"{str(dtype)[6:]}[{rows}, {columns}]", [weight]


def quantized(rows, columns, dtype, bits=4, group=64, symmetric=False):
    setting = Quantize(bits, group, symmetric)
    encoded = setting.encode(normal(rows, columns) / columns**0.5 + 0.01, Metric())
    tensors = [encoded[key] for key in setting.keys]
    types = [f"{str(t.dtype)[6:]}[{', '.join(map(str, t.shape))}]" for t in tensors]
    if symmetric:
        types.insert(2, "None")
    given = f"bits={bits}, group_size={setting.group(columns)}, columns={columns}, dtype={str(dtype)[6:]}"
    return f"dequantize({', '.join(types)}, {given})", tensors


def float8(rows, columns, dtype):
    encoded = Float8().encode(normal(rows, columns) / columns**0.5, Metric())
    spec = f"dequantize_float8(uint8[{rows}, {columns}], float32[{rows}, 1], dtype={str(dtype)[6:]})"
    return spec, [encoded["codes"], encoded["scales"]]


def two_of_four(rows, columns, dtype):
    weight = normal(rows, columns) / columns**0.5
    keep = torch.zeros(rows, columns // 4, 4).scatter_(2, weight.abs().view(rows, -1, 4).topk(2).indices, 1).bool()
    keep = keep.flatten(1)
    patterns, values = patterns_of(keep), weight[keep].view(rows, -1).to(dtype)
    types = f"uint8[{rows}, {patterns.shape[1]}], {str(dtype)[6:]}[{rows}, {columns // 2}]"
    return f"unmask_2_4({types})", [patterns, values]


def masked(rows, columns, dtype, tile=1, share=0.55):
    """Every row keeps as many, each its own."""
    kept = round(columns // tile * share)
    keep = normal(rows, columns // tile).argsort(1).argsort(1) < kept
    spec = f"uint8[{rows}, {mask_bytes(columns // tile)}], {str(dtype)[6:]}[{rows}, {kept * tile}]"
    values = (normal(rows, kept * tile, seed=2) / columns**0.5).to(dtype)
    return f"unmask({spec}, columns={columns}, tile={tile})", [bits_of(keep), values]


def tiles(rows, columns, dtype, tile=16, kept=3, values=dense):
    """The rows of a tile keep the same; `values` says how."""
    keep = normal(rows // tile, columns // tile).argsort(1).argsort(1) < kept
    mask = f"repeat_interleave(uint8[{rows // tile}, {mask_bytes(columns // tile)}], repeats={tile}, dim=0)"
    spec, tensors = values(rows, kept * tile, dtype)
    return f"unmask({mask}, {spec}, columns={columns}, tile={tile})", [bits_of(keep), *tensors]


def unpacked(weight, tensors, columns, dtype):
    """The weight (rows, columns) in float64, by the op that unpacks it."""
    spec = parse(f"linear(x, {weight.replace(str(dtype)[6:], 'float64')})")
    doubled = [t.double() if t.dtype == dtype else t for t in tensors]
    return evaluate(spec, torch.eye(columns, dtype=torch.float64), doubled, [])[0].T


def both(weight, tensors, tail, x, extras, config, bias=True):
    """-> (what the kernel gives, the body in float64, the size of what is added up)."""
    wide = unpacked(weight, tensors, x.shape[-1], x.dtype)
    rows = len(wide)
    dtype = str(x.dtype)[6:]
    spec = parse(f"linear(x, {weight}, {dtype}[{rows}]){tail}" if bias else f"linear(x, {weight}){tail}")
    own = [normal(rows, seed=3).to(x.dtype)] if bias else []
    kinds = tuple(kind_of(e.shape, (*x.shape[:-1], rows)) for e in extras)
    kernel = generate(spec, x.dtype, kinds)
    with interpreter():
        made = kernel(x, kernel.prepare([*tensors, *own]), extras, config)
    # The reference: the same program in float64 on the very numbers, its weight unpacked in float64.
    exact = parse(str(spec).replace(dtype, "float64"))
    doubled = [t.double() if t.dtype == x.dtype else t for t in [*tensors, *own]]
    want = evaluate(exact, x.double(), doubled, [e.double() for e in extras])
    size = float((x.double().abs().flatten(0, -2) @ wide.abs().T).max())
    return made, want, size


def close(made, want, size, columns):
    """One rounding to the dtype of the output; in float32, sums of `columns` products whose sizes add to `size`."""
    for got, wanted in zip(made, want, strict=True):
        assert bool(torch.isfinite(got).all())
        room = torch.finfo(got.dtype).eps / 2 * wanted.abs() + 4 * (columns + 8) * 2.0**-24 * (size + 1)
        worst = float(((got.double() - wanted).abs() - room).max())
        assert worst <= 0, f"{worst:.3g} too much, where {float(room.max()):.3g} is allowed"


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("kept", ["dense", "zeros", "symmetric", "row", "float8", "2:4", "mask"])
def test_a_linear_with_its_epilogue(kept, split, dtype):
    rows, columns, tokens = 72, 416, 5  # no multiple of a tile, and a step that is not full
    make = {
        "dense": lambda: dense(rows, columns, dtype), "zeros": lambda: quantized(rows, columns, dtype, 4, 64),
        "symmetric": lambda: quantized(rows, columns, dtype, 4, 64, True),
        "row": lambda: quantized(rows, columns, dtype, 8, 0), "float8": lambda: float8(rows, columns, dtype),
        "2:4": lambda: two_of_four(rows, columns, dtype), "mask": lambda: masked(rows, columns, dtype),
    }[kept]  # fmt: skip
    x = normal(tokens, columns, seed=1).to(dtype)
    extras = [normal(tokens, rows, seed=4).to(dtype), normal(tokens, 1, seed=5).to(dtype)]
    made, want, size = both(*make(), TAIL, x, extras, Config(16, 32, split))
    close(made, want, size * max(1.2, 1.2 * float(extras[1].abs().max())), columns)  # a GELU's slope, then the factor


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("bits", "group"), [*itertools.product(BITS, [32, 64, 128, 0])])
def test_every_width_and_group(bits, group, dtype):
    x = normal(2, 3, 300, seed=1).to(dtype)
    made, want, size = both(*quantized(48, 300, dtype, bits, group), "", x, [], Config(16, 64))
    assert made[0].shape == (2, 3, 48)
    close(made, want, size, 300)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("kept", ["16, 3", "16, 9", "32, 5", "zeros", "row", "float8"])
def test_tiles_that_went_are_skipped(kept, split, dtype):
    rows, columns, tokens = 96, 320, 5
    make = {
        "zeros": lambda: tiles(rows, columns, dtype, 16, 12, quantized),
        "row": lambda: tiles(rows, columns, dtype, 16, 9, lambda *sizes: quantized(*sizes, 8, 0)),
        "float8": lambda: tiles(rows, columns, dtype, 16, 9, float8),
    }.get(kept) or (lambda: tiles(rows, columns, dtype, *map(int, kept.split(","))))  # fmt: skip
    weight, tensors = make()
    x = normal(tokens, columns, seed=1).to(dtype)
    made, want, size = both(weight, tensors, " | relu(_)", x, [], Config(16, 64, split))
    close(made, want, size, columns)


@pytest.mark.parametrize(
    ("tile", "values", "near"),
    [
        (16, dense, 16), (64, dense, 64), (128, dense, 64), (32, quantized, 32), (16, two_of_four, 1),
        (32, lambda *sizes: quantized(*sizes, 2, 64), 16),
    ],
)  # fmt: skip
def test_no_more_columns_are_called_neighbours_than_are(tile, values, near):
    """What is told to the compiler the interpreter does not see: a plane may start in the middle of a tile."""
    weight, _ = tiles(tile, 4 * tile, torch.float16, tile, 2, values)
    assert f", {tile}, {near})" in generate(parse(f"linear(x, {weight})"), torch.float16).source


def test_tiles_that_went_are_not_even_multiplied():
    weight, tensors = tiles(16, 128, torch.float16)
    read = unpacked(weight, tensors, 128, torch.float16)[0] != 0
    x = normal(5, 128, seed=1).half()
    kernel = generate(parse(f"linear(x, {weight})"), torch.float16)
    with interpreter():
        some, (all_,) = [kernel(v, kernel.prepare(tensors), []) for v in (x.where(read, torch.nan), x)]
    assert torch.equal(some[0], all_)


@pytest.mark.parametrize("rows", [40, 41])
def test_tiles_too_small_to_be_skipped_are_read_as_a_mask_of_columns(rows):
    if rows == 40:  # the rows of a tile share their mask
        weight, tensors = tiles(40, 136, torch.float16, 4, 20)
    else:  # each row has its own
        weight, tensors = masked(41, 136, torch.float16, 8)
    x = normal(3, 136, seed=1).half()
    made, want, size = both(weight, tensors, "", x, [], Config(16, 32))
    close(made, want, size, 136)


@pytest.mark.parametrize("tokens", [1, 16, 33])
def test_any_number_of_tokens(tokens):
    x = normal(tokens, 128, seed=1).half()
    made, want, size = both(*quantized(40, 128, torch.float16), " | relu(_)", x, [], Config(16, 32), bias=False)
    close(made, want, size, 128)


def test_no_tokens_give_an_empty_result_without_a_launch():
    kernel = generate(parse("linear(x, float16[40, 128])"), torch.float16)
    (made,) = kernel(torch.empty(2, 0, 128).half(), [normal(40, 128).half()], [])
    assert (made.shape, made.dtype) == ((2, 0, 40), torch.float16)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("kept", ["dense", "quantized", "V quantized", "masked"])
def test_low_rank_stays_on_the_chip(kept, dtype):
    rows, columns, rank, tokens = 72, 160, 40, 21
    v = {"dense": dense, "masked": masked}.get(kept, quantized)(rank, columns, dtype)
    u = {"quantized": lambda *sizes: quantized(*sizes, 8, 0), "masked": masked}.get(kept, dense)(rows, rank, dtype)
    name = str(dtype)[6:]
    x, bias = normal(tokens, columns, seed=1).to(dtype), normal(rows, seed=3).to(dtype)
    spec = parse(f"low_rank_linear(x, {v[0]}, {u[0]}, {name}[{rows}]) | silu(_)")
    kernel = generate(spec, dtype)
    tensors = [*v[1], *u[1], bias]
    with interpreter():
        (made,) = kernel(x, kernel.prepare(tensors), [], Config(16, 32, 2))
    doubled = [t.double() if t.dtype == dtype else t for t in tensors]
    (want,) = evaluate(parse(str(spec).replace(name, "float64")), x.double(), doubled, [])
    # What is between the two is rounded to dtype, as the op's body does; a SiLU is nowhere steeper than 1.1. float32
    # adds up columns and rank products, whose sizes are at most `size` in all.
    w_v, w_u = unpacked(*v, columns, dtype), unpacked(*u, rank, dtype)
    middle = (x.double() @ w_v.T).abs() @ w_u.abs().T
    size = x.double().abs() @ w_v.abs().T @ w_u.abs().T
    between = torch.finfo(dtype).eps / 2 * middle
    single = (columns + rank) * 2.0**-24 * (size + 1)
    room = torch.finfo(dtype).eps / 2 * want.abs() + 1.1 * (between + 2 * single) + 2.0**-22
    assert bool(((made.double() - want).abs() <= room).all())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kept", ["dense", "groups", "row"])
def test_quaternions_read_a_quarter_of_the_weight(kept, dtype):
    rows, tokens = 24, 5  # of the components: 96 outputs
    columns = 200 if kept == "dense" else 512  # components of 50 fill no tile; coded ones are whole steps
    c, own = {
        "dense": lambda: dense(rows, columns, dtype), "groups": lambda: quantized(rows, columns, dtype, 4, 64),
        "row": lambda: quantized(rows, columns, dtype, 8, 0),
    }[kept]()  # fmt: skip
    name = str(dtype)[6:]
    x, bias = normal(tokens, columns, seed=1).to(dtype), normal(4 * rows, seed=3).to(dtype)
    spec = parse(f"quaternion_linear(x, {c}, {name}[{4 * rows}]) | gelu(_) | add(_, extra[0])")
    extras = [normal(tokens, 4 * rows, seed=4).to(dtype)]
    kernel = generate(spec, dtype, ("full",))
    with interpreter():
        made = kernel(x, kernel.prepare([*own, bias]), extras, Config(16, 16))
    doubled = [t.double() if t.dtype == dtype else t for t in [*own, bias]]
    exact = parse(str(spec).replace(name, "float64"))
    want = evaluate(exact, x.double(), doubled, [e.double() for e in extras])
    size = float(x.double().abs().sum(1).max()) * 5 / columns**0.5  # five standard deviations of a weight
    close(made, want, size, columns)


def test_components_that_are_no_whole_steps_are_refused():
    weight, _ = quantized(8, 96, torch.float16, 8, 0)
    with pytest.raises(SpecError, match="chunks of 24 columns cannot be read in steps of 64 by Quantized"):
        generate(parse(f"quaternion_linear(x, {weight})"), torch.float16)


def test_several_outputs():
    x = normal(7, 64, seed=1).half()
    tail = " | silu(_) | mul(_, extra[0]) | outputs(step[0], _)"
    made, want, size = both(*dense(32, 64, torch.float16), tail, x, [normal(32, seed=2).half()], Config(16, 32))
    assert len(made) == 2
    close(made, want, size * 1.1 * 4, 64)  # a SiLU's slope, then a factor below 4


def test_a_split_leaves_its_counters_at_zero_and_gives_the_same_bits(monkeypatch):
    weight, tensors = quantized(64, 512, torch.float16)
    kernel = generate(parse(f"linear(x, {weight})"), torch.float16)
    x, prepared = normal(3, 512).half(), kernel.prepare(tensors)
    config = Config(16, 32, 4)
    workspace = kernel.workspace(x, config)
    monkeypatch.setattr(type(kernel), "workspace", lambda *_: workspace)  # one for both launches
    with interpreter():
        first, second = (kernel(x, prepared, [], config)[0] for _ in range(2))
        assert not bool(workspace["arrived"].any())
    assert torch.equal(first, second)
    assert bool(workspace["partials"].any())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("linear(x, float32[8, 8]) | to(_, dtype=float64)", "there is no epilogue for to"),
        (f"linear(x, unmask(uint8[8, 8], {quantized(8, 32, torch.float32)[0]}, columns=64, tile=1))",
         "no loader for unmask of dequantize: only tiles of 16, 32, 64 or 128 keep packed values"),
        ("linear(x, unmask(t(uint8[8, 8]), float32[8, 4], columns=8, tile=1))", "no loader for a mask made by t"),
        ("linear(x, unmask(uint8[8, 16384], float32[8, 65536], columns=131072, tile=1))",
         "rows of 65536 kept values cannot be read: at most 65535"),
        (f"quaternion_linear(x, {tiles(16, 64, torch.float32)[0]})", "quaternions cannot be read as Tiles"),
        ("linear(x, unmask(repeat_interleave(uint8[1, 1], repeats=16, dim=0), float32[16, 24], columns=64, tile=16))",
         "24 kept columns are no whole number of tiles of 16"),
        ("relu(x)", "there is no main loop for relu"),
    ],
)
def test_what_cannot_be_emitted_is_named(spec, message):
    with pytest.raises(SpecError, match=message):
        generate(parse(spec), torch.float32)


def test_inputs_without_kernels_are_named():
    with pytest.raises(SpecError, match=r"no kernels for inputs of torch\.float64; there are for float16"):
        generate(parse("linear(x, float64[8, 8])"), torch.float64)


def test_source_that_fails_leaves_no_module_behind():
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            load_source("1 / 0\n")
