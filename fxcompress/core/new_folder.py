"""A folder that is there whole or not at all: written beside its target, then renamed into place."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from fxcompress.core.errors import CheckpointError


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Gives the folder to write into; it is `target` at the end. Raises `CheckpointError`; then nothing is left."""
    refuse_existing(target)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        os.rename(partial, target)
    except OSError as error:
        raise CheckpointError(
            f"{target} could not be written ({error.strerror or error}); nothing was left behind."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(target: Path) -> None:
    """Raises `CheckpointError` where there is anything already."""
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} exists already; choose a new folder or remove it first.")
