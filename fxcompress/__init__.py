"""fxcompress: a compiler that makes trained networks smaller and faster.

    compiled = fxcompress.compile(model, budget="4x", calibration=batches)
"""

import contextlib
import importlib

from fxcompress import lottery
from fxcompress.api import compile
from fxcompress.checkpoint import load, save
from fxcompress.core.budget import Budget
from fxcompress.core.plan import Plan
from fxcompress.core.show import show
from fxcompress.cost_model.device import DeviceProfile
from fxcompress.evaluation import evaluate, read_task
from fxcompress.exporting import export_program
from fxcompress.lowering import lower
from fxcompress.module_mode import apply
from fxcompress.onnx_export import export_onnx
from fxcompress.profiling import profile
from fxcompress.report import Report
from fxcompress.restructuring import restructure

with contextlib.suppress(ImportError):  # without transformers, or with one too old, all else works
    importlib.import_module("fxcompress.hf_quantizer")

__version__ = "0.1.0"
__all__ = [
    "Budget", "DeviceProfile", "Plan", "Report", "apply", "compile", "evaluate", "export_onnx", "export_program",
    "load", "lottery", "lower", "profile", "read_task", "restructure", "save", "show",
]  # fmt: skip
