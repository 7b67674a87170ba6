"""Every kernel on real hardware. Without pytest: python3 -m tests.gpu"""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("these tests run kernels on a CUDA GPU, and torch sees none", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import _bare

_bare.use()

from tests.gpu.cases import cases  # noqa: E402
from tests.gpu.ground import gpu  # noqa: E402


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases()])
def test_on_this_gpu(case):
    if case.missing:
        pytest.skip(f"not installed: {', '.join(case.missing)}")
    case.run(gpu())
