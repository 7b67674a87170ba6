"""codegen and core on a machine that has torch and triton alone.

`import fxcompress` brings the whole compiler, and with it scipy, safetensors, tabulate and tqdm. Where one of them is
missing, the package is entered without its __init__: kernels, their ops and specs need none of them.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

NEEDED = ("scipy", "safetensors", "tabulate", "tqdm")


def use() -> None:
    """Before the first import of fxcompress. Does nothing where everything is there; ends where Triton is not."""
    if importlib.util.find_spec("triton") is None:
        sys.exit("kernels are compiled by Triton, which is not installed here: pip install 'triton>=3.6'")
    if "fxcompress" in sys.modules or all(importlib.util.find_spec(name) for name in NEEDED):
        return
    package = ModuleType("fxcompress")
    package.__path__ = [str(Path(__file__).resolve().parents[1] / "fxcompress")]
    package.__version__ = "a checkout"
    sys.modules["fxcompress"] = package
