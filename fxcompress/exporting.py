"""export_program: a compressed module as torch.export's program, with the open sizes it was captured with.

    program = fxcompress.export_program(compiled)
    torch.export.save(program, "model.pt2")                    # import fxcompress before torch.export.load
    torch._inductor.aoti_compile_and_package(program, package_path="model.pt2")      # and before aoti_load_package

Both files call the operators that importing fxcompress registers, and hold the weights in their codes. Where they are
not registered, torch.export.load says only "We ran into an error when deserializing the saved file"; the warning above
it names the operator. A model that answers with a class of transformers needs `import transformers.modeling_outputs`,
too.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fxcompress.codegen.cpu.module import LoweredModule
from fxcompress.core.capture import recapture
from fxcompress.core.errors import ExportError
from fxcompress.core.signature import SignedModule


def export_program(compiled: SignedModule) -> torch.export.ExportedProgram:
    """`compiled` (of `compile`, `restructure` or `load`) exported for inference, sharing its tensors.

    The same bits as `compiled` gives, at every size in its range. It takes exactly the inputs it was captured with.
    Raises `ExportError`.
    """
    check_exportable(compiled, "export_program")
    return recapture(compiled)


def check_exportable(compiled: object, taker: str) -> None:
    """Raises `ExportError` for what is no compressed graph."""
    if isinstance(compiled, LoweredModule):
        raise ExportError("a lowered module fits this machine alone; export the compiled one it was made from.")
    if not isinstance(compiled, SignedModule):
        raise ExportError(
            f"{taker} takes what fxcompress.compile, restructure or load returned, not a {type(compiled).__name__}."
        )


def refuse_existing_file(path: str | os.PathLike[str]) -> Path:
    """`path`, where nothing is yet. Raises `ExportError`."""
    target = Path(path)
    if target.exists() or target.is_symlink():
        raise ExportError(f"{target} exists already; choose a new file or remove it first.")
    return target
