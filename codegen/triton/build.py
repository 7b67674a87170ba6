"""Source text -> module: one file for each text, named by its hash, in a folder that only the user can read.

Real files give tracebacks, profilers and debuggers something to point at; a hash for a name and an atomic rename make
the folder safe between processes, and Triton's own cache hits across all of them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType


def cache_folder() -> Path:
    """$FXCOMPRESS_CACHE, or ~/.cache/fxcompress."""
    return Path(os.environ.get("FXCOMPRESS_CACHE") or Path.home() / ".cache" / "fxcompress")


def load_source(source: str) -> ModuleType:
    """The module of `source`, imported once a process."""
    digest = digest_of(source)
    name = f"fxcompress_kernel_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    path = write_source(source, digest)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # half a module must not be found again
        raise
    return module


def write_source(source: str, digest: str) -> Path:
    """`<cache>/<hh>/<hash>.py` with this text, whole or not at all."""
    path = source_path(digest)
    if not path.is_file() or path.read_text(encoding="utf-8") != source:
        write_whole(path, source)
    return path


def digest_of(source: str) -> str:
    """What its file is named by."""
    return hashlib.sha256(source.encode()).hexdigest()[:24]


def source_path(digest: str) -> Path:
    """Where the text of that hash is, or will be."""
    return cache_folder() / digest[:2] / f"{digest}.py"


def write_whole(path: Path, text: str) -> None:
    """The file, whole or not at all, in a folder only the user can read; another process sees the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
