"""fxcompress: a compiler that makes trained networks smaller and faster.

    compiled = fxcompress.compile(model, budget="4x", calibration=batches)
"""

from fxcompress import lottery
from fxcompress.api import compile
from fxcompress.checkpoint import load, save
from fxcompress.core.budget import Budget
from fxcompress.core.plan import Plan
from fxcompress.core.show import show
from fxcompress.lowering import lower
from fxcompress.report import Report
from fxcompress.restructuring import restructure

__version__ = "0.1.0"
__all__ = ["Budget", "Plan", "Report", "compile", "load", "lottery", "lower", "restructure", "save", "show"]
