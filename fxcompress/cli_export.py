"""fxcompress export: a compressed folder as a file that other programs run.

    fxcompress export ./my-bert-4x --onnx my-bert-4x.onnx
    fxcompress export ./my-bert-4x --pt2 my-bert-4x.pt2 --aoti my-bert-4x-cpu.pt2
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

import torch

from fxcompress.checkpoint import load
from fxcompress.core.errors import ExportError
from fxcompress.core.signature import SignedModule
from fxcompress.exporting import export_program, refuse_existing_file
from fxcompress.onnx_export import export_onnx


def add(command: Callable[[str, Any, str], argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = command("export", _export, "write a compressed folder as ONNX, torch.export or AOTInductor file")
    parser.add_argument("folder", metavar="DIR", help="folder written by `fxcompress compress` or fxcompress.save")
    parser.add_argument("--onnx", metavar="FILE", help="an ONNX file of opset 21, weights in their codes")
    parser.add_argument("--pt2", metavar="FILE", help="a program for torch.export.load, after `import fxcompress`")
    parser.add_argument("--aoti", metavar="FILE.pt2", help="compiled for this CPU, after `import fxcompress`")


def _export(options: argparse.Namespace) -> None:
    wanted = {name: path for name in _WRITERS if (path := getattr(options, name))}
    if not wanted:
        raise ExportError("export writes what is asked for: give --onnx FILE, --pt2 FILE or --aoti FILE.pt2.")
    if len({os.path.abspath(path) for path in wanted.values()}) < len(wanted):
        raise ExportError("two of the files to write have one name; give each its own.")
    if options.aoti and not options.aoti.endswith(".pt2"):
        raise ExportError(f"--aoti {options.aoti}: torch wants the name to end in .pt2.")
    for path in wanted.values():  # before anything is written
        refuse_existing_file(path)
    compiled = load(options.folder)
    for name, path in wanted.items():
        _WRITERS[name](compiled, path)
    data = [{"format": name, "out": path, "bytes": os.path.getsize(path)} for name, path in wanted.items()]
    lines = [f"{path}: {os.path.getsize(path):,} bytes" for path in wanted.values()]
    print(json.dumps(data) if options.json else "\n".join(lines))


def _pt2(compiled: SignedModule, path: str) -> None:
    torch.export.save(export_program(compiled), path)


def _aoti(compiled: SignedModule, path: str) -> None:
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(export_program(compiled), package_path=path)


_WRITERS: dict[str, Callable[[SignedModule, str], None]] = {"onnx": export_onnx, "pt2": _pt2, "aoti": _aoti}
