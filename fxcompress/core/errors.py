"""What can go wrong, one class each. Every message says what was found, what was wanted and what to do."""

from __future__ import annotations


class FxcompressError(Exception):
    """Base of every error fxcompress raises on purpose."""


class BudgetError(FxcompressError, ValueError):
    """A budget that means nothing: `"fast"`, 0, negative, `"0.5x"`."""


class WorkloadError(FxcompressError, ValueError):
    """A workload that means nothing, or that the captured graph cannot be called with."""


class InfeasibleBudgetError(FxcompressError, ValueError):
    """A budget no choice of rewrites can meet; the message states the achievable range."""


class CaptureError(FxcompressError):
    """torch.export could not turn the model into a graph; the message names the model's line."""


class InputError(FxcompressError, ValueError):
    """Inputs that do not fit what was captured."""


class CalibrationError(FxcompressError, ValueError):
    """Calibration batches that are empty, of the wrong shape, or make the model produce NaN."""


class NonFiniteError(FxcompressError, ValueError):
    """NaN or infinity in a weight."""


class SpecError(FxcompressError, ValueError):
    """The text of a rewrite that does not parse, or names a rewrite that does not exist."""


class PlanError(FxcompressError, ValueError):
    """A plan that does not fit the model it is applied to."""


class CheckpointError(FxcompressError):
    """A folder that is not a whole fxcompress checkpoint, or could not be written."""


class LoweringError(FxcompressError, ValueError):
    """A module that cannot be lowered, or a place it cannot be lowered to."""


class ExportError(FxcompressError, ValueError):
    """A module that another format cannot say, or a file that cannot be written."""


class BackendError(FxcompressError, ValueError):
    """torch.compile asks the backend for what it does not do, or with options that mean nothing."""


class KernelError(FxcompressError):
    """A kernel that cannot be built here, or is not what it should be."""


class ProfileError(FxcompressError, ValueError):
    """A profile of a device that is not whole, or of another device, number of threads or version."""


class EvaluationError(FxcompressError, ValueError):
    """A task that does not parse, or that a model cannot be measured on."""
