"""Every way a weight is kept, alone in an ONNX file: the compiled graph's numbers, in as few bytes."""

from __future__ import annotations

import warnings

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.codegen.onnx.plain import BODIES, KEPT, REFUSED
from fxcompress.codegen.ops import OPS, fused
from fxcompress.core.errors import ExportError

EPS = torch.finfo(torch.float32).eps
STORAGES = [
    "quantize{bits=8, group_size=0}", "quantize{bits=8, group_size=32}", "quantize{bits=4, group_size=64}",
    "quantize{bits=4, group_size=0}", "quantize{bits=3, group_size=32}", "quantize{bits=3, group_size=0}",
    "quantize{bits=2, group_size=64}", "quantize{bits=2, group_size=0}",
    "quantize{bits=4, group_size=32, symmetric=True}", "quantize{bits=8, group_size=0, symmetric=True}",
    "quantize{bits=3, group_size=64, power_of_two=True}", "float8",
]  # fmt: skip
STRUCTURES = [
    "low_rank{rank=24}", "block_low_rank{blocks=4, rank=8}", "monarch{blocks=4, rank=12}", "tensor_train{rank=16}",
    "quaternion", "prune{sparsity=0.5}", "prune_2_4", "prune_blocks{sparsity=0.5, block=16}",
]  # fmt: skip
COMPOSED = [f"{structure} | quantize{{bits={bits}, group_size=0}}" for structure in STRUCTURES for bits in (4, 8)]
OTHERS = ["quantize_residual{bits=3, group_size=64, rank=4}", "int8_dynamic{smooth=0.5}", "float8_dynamic{smooth=0.5}"]


def session(path):
    """In float32: by default the codes are multiplied by inputs rounded to 8 bits."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def restructured(model, rewrites, example, calibration=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = fxcompress.restructure(
            model, rewrites, example_inputs=example, calibration=calibration, progress=False
        )
    return made.eval()


def stored(compiled):
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in compiled.state_dict().values()}.values())


def both(compiled, path, x):
    fxcompress.export_onnx(compiled, path)
    onnx.checker.check_model(str(path), full_check=True)
    run = session(path)
    (name,) = (value.name for value in run.get_inputs())
    with torch.no_grad():
        return compiled(x), torch.from_numpy(run.run(None, {name: x.numpy()})[0])


@pytest.mark.parametrize("columns", [192, 200], ids=["whole_groups", "short_group"])
@pytest.mark.parametrize("spec", [*STORAGES, *STRUCTURES, *COMPOSED, *OTHERS])
def test_a_linear_weight(spec, columns, tmp_path):
    if columns == 200 and "prune_blocks" in spec:
        columns = 208  # whole tiles
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(columns, 96)
    nn.init.normal_(model.weight, generator=generator)
    nn.init.normal_(model.bias, generator=generator)
    compiled = restructured(nn.Sequential(model), {"*": spec}, None, [torch.randn(64, columns, generator=generator)])
    assert [str(s.spec) for s in compiled.report.sites if s.spec != "keep"], "the rewrite was refused"
    x = torch.randn(3, 5, columns, generator=generator).flatten(0, 1)
    want, got = both(compiled, tmp_path / "model.onnx", x)
    # Each of the two sums of `columns` terms may be wrong by columns eps of their absolute values, and each weight by 8
    # roundings. What a weight's two parts s (q - c) and s / 2 cancel, and what two factors cancel, is no more than
    # twice the largest weight.
    terms = x.abs().sum(1, keepdim=True) * read_back(compiled, columns).abs().max()
    assert (want - got).abs().le(4 * (columns + 8) * EPS * terms).all()
    text = 6_000  # nodes and names
    assert (tmp_path / "model.onnx").stat().st_size < 1.03 * stored(compiled) + text


def read_back(compiled, columns):
    """The weight: what the graph makes of unit vectors, without the bias."""
    with torch.no_grad():
        zero = compiled(torch.zeros(1, columns))
        return compiled(torch.eye(columns)) - zero


class Table(nn.Module):
    """A lookup alone, or one whose table is the head as well."""

    def __init__(self, columns=96, tied=False, rows=300):
        super().__init__()
        self.table = nn.Embedding(rows, columns)
        self.head = nn.Linear(columns, rows, bias=False) if tied else nn.Identity()
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids))


def drawn(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


IDS = torch.randint(0, 300, (3, 7), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "spec", [*STORAGES, "low_rank{rank=16} | quantize{bits=4, group_size=0}", "prune{sparsity=0.5}", "prune_2_4"]
)
def test_a_table_is_read_row_by_row(spec, tmp_path):
    compiled = restructured(drawn(Table), {"*": spec}, None, [IDS, IDS.flip(0)])
    assert [s for s in compiled.report.sites if s.spec != "keep"], "the rewrite was refused"
    want, got = both(compiled, tmp_path / "model.onnx", IDS)
    # The arithmetic of the op in its order, apart from 2^x (2 ulp of a number near 1, so 2 eps here), and where there
    # are two factors the order of a sum of 16 products.
    assert (want - got).abs().max() <= (16 + 4) * EPS * want.abs().max()
    assert (tmp_path / "model.onnx").stat().st_size < 1.01 * stored(compiled) + 6_000


def test_a_table_in_tiers_of_more_rows_than_int16_counts(tmp_path):
    rows = 36_000
    ids = torch.arange(rows).reshape(6, -1)
    spec = "quantize_rows{rows8=4000, rows4=6000, rows3=12000, rows2=14000}"
    compiled = restructured(drawn(lambda: Table(16, rows=rows)), {"*": spec}, None, [ids[:1, :300], ids[:1, 100:200]])
    assert [s for s in compiled.report.sites if s.spec == spec]
    want, got = both(compiled, tmp_path / "model.onnx", ids)
    assert (want - got).abs().max() <= 4 * EPS * want.abs().max()  # as above
    assert (tmp_path / "model.onnx").stat().st_size < 1.01 * stored(compiled) + 8_000


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_a_table_shared_with_the_head_is_written_once(bits, tmp_path):
    compiled = restructured(drawn(lambda: Table(tied=True)), {"*": f"quantize{{bits={bits}, group_size=0}}"}, (IDS,))
    want, got = both(compiled, tmp_path / "model.onnx", IDS)
    # sums of 96 products; of the absolute terms, which are at most 96 times the product of the largest two
    assert (want - got).abs().max() <= 4 * (96 + 8) * EPS * want.abs().max()
    assert (tmp_path / "model.onnx").stat().st_size < 1.01 * stored(compiled) + 6_000


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 48, 3, padding=1, stride=2)

    def forward(self, image):
        return self.conv(image)


@pytest.mark.parametrize(
    "spec",
    ["quantize{bits=8, group_size=0}", "quantize{bits=4, group_size=32}", "quantize{bits=3, group_size=64}", "float8",
     "low_rank{rank=16}", "low_rank{rank=16} | quantize{bits=4, group_size=64}", "prune{sparsity=0.5}"],
)  # fmt: skip
def test_a_convolution(spec, tmp_path):
    images = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(3))
    compiled = restructured(drawn(Convolution), {"*": spec}, (images,))
    assert [s for s in compiled.report.sites if s.spec != "keep"], "the rewrite was refused"
    want, got = both(compiled, tmp_path / "model.onnx", images)
    # sums of 32 * 9 products in another order; the absolute terms add up to at most sqrt(288) = 17 times the size of a
    # sum of random signs
    assert (want - got).abs().max() <= 17 * (288 + 8) * EPS * want.abs().max()
    assert (tmp_path / "model.onnx").stat().st_size < 1.01 * stored(compiled) + 6_000


def test_a_train_of_a_table_is_refused_by_name(tmp_path):
    compiled = restructured(drawn(Table), {"*": "tensor_train{rank=4}"}, (IDS,))
    with pytest.raises(ExportError) as error:
        fxcompress.export_onnx(compiled, tmp_path / "model.onnx")
    assert str(error.value) == (
        "fxcompress::tensor_train_embedding at table: it multiplies other cores for every id, which ONNX can only say "
        "with slices for all of them. Compile again with rewrites=[...] that leave it out, such as "
        "rewrites=['quantize', 'low_rank']."
    )
    assert not list(tmp_path.iterdir())


def test_every_op_is_spelled_out_or_refused():
    mine = {op._opoverload for op in OPS} - {fused.fused._opoverload, fused.fused_parallel._opoverload}
    assert mine == {*BODIES, *KEPT, *REFUSED}
