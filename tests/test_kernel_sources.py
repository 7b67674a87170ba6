"""The emitted text of a few specs, so that a refactoring that claims to change nothing proves it."""

import os
import subprocess
import sys

import pytest
import torch

from fxcompress.codegen.spec import parse

pytest.importorskip("triton", reason="triton is not installed")

from fxcompress.codegen.triton.build import load_source, write_source
from fxcompress.codegen.triton.generate import generate

Q4 = (
    "dequantize(uint8[96, 64], uint8[96, 2], uint8[96, 1], float32[2], bits=4, group_size=64, columns=128, "
    "dtype=bfloat16)"
)
V4 = (
    "dequantize(uint8[24, 128], uint8[24, 4], uint8[24, 2], float32[2], bits=4, group_size=64, columns=256, "
    "dtype=bfloat16)"
)
MASK = "repeat_interleave(uint8[6, 1], repeats=16, dim=0)"
SPECS = {
    "quantized": f"linear(x, {Q4}, bfloat16[96]) | gelu(_) | add(_, extra[0])",
    "masked": "linear(x, unmask(uint8[96, 16], bfloat16[96, 40], columns=128, tile=1), bfloat16[96])",
    "tiles": f"linear(x, unmask({MASK}, bfloat16[96, 48], columns=128, tile=16), bfloat16[96])",
    "low_rank": "low_rank_linear(x, bfloat16[40, 128], bfloat16[96, 40]) | silu(_)",
    "quaternion": "quaternion_linear(x, bfloat16[24, 128], bfloat16[96])",
    "block_low_rank": f"block_low_rank_linear(x, {V4}, bfloat16[96, 24], blocks=2, bias=bfloat16[96]) | relu(_)",
    "monarch": "monarch_linear(x, bfloat16[24, 128], bfloat16[96, 24], blocks=4)",
    "tensor_train": "tensor_train_linear(x, [bfloat16[4, 20], bfloat16[20, 20], bfloat16[15, 12]], n=[4, 4, 3], "
    "m=[4, 4, 12], rows=190, bias=bfloat16[190])",
    "int8": "int8_dynamic_linear(x, int8[96, 128], float32[96], float32[128])",
    "float8": "float8_dynamic_linear(x, uint8[96, 100], float32[96], float32[100])",
}


@pytest.mark.parametrize("name", SPECS)
def test_source(name, golden):
    spec = parse(SPECS[name])
    golden(generate(spec, torch.bfloat16, ("full",) * spec.extras).source)


def test_a_source_is_one_file_named_by_its_text_and_written_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path))
    source = "ANSWER = 42  # of this test alone\n"
    assert load_source(source) is load_source(source)
    (file,) = tmp_path.rglob("*.py")
    assert file.read_text() == source
    assert file.parent.stat().st_mode & 0o077 == 0  # only the user can put code there
    before = file.stat().st_mtime_ns
    assert write_source(source, file.stem) == file
    assert file.stat().st_mtime_ns == before
    assert [p for p in tmp_path.rglob("*") if p.suffix == ".partial"] == []


def test_many_processes_may_want_the_same_source_at_once(tmp_path):
    code = "import sys\nfrom fxcompress.codegen.triton.build import load_source\nprint(load_source(sys.argv[1]).ANSWER)"
    source = "ANSWER = sum(range(10**6))  # long enough to be read half written\n" + "# padding\n" * 50_000
    environment = {**os.environ, "FXCOMPRESS_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code, source[:60_000]]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate()[0].strip() for process in running] == ["499999500000"] * 4
    assert [path.suffix for path in tmp_path.rglob("*.p*") if path.is_file() and path.suffix != ".pyc"] == [".py"]
