"""The command line. Results on stdout, progress and complaints on stderr, non-zero on any failure.

    fxcompress compress ./my-bert --budget 4x --calibration texts.txt --out ./my-bert-4x
    fxcompress compress ./my-bert --budget 4x --calibration texts.txt --modules --out ./my-bert-4x-hf
    fxcompress plan ./my-bert --budget 4x --calibration texts.txt --html plan.html
    fxcompress plan ./my-bert --budget 4x --latency 2x --workload query=1x16 index=32x128:0.1
    fxcompress inspect ./my-bert-4x
    fxcompress inspect ./my-bert-4x --cost --at s0=8,s1=128
    fxcompress eval ./my-bert-4x --original ./my-bert --task sts.tsv
    fxcompress export ./my-bert-4x --onnx my-bert-4x.onnx
    fxcompress kernels --arch 90
    fxcompress tune ./my-bert-4x
    fxcompress profile
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from fxcompress import __version__, cli_export, profiling
from fxcompress.api import compile, plan_only
from fxcompress.checkpoint import load, save
from fxcompress.codegen.costs import cost_of
from fxcompress.codegen.cpu.module import Target
from fxcompress.core.budget import Budget
from fxcompress.core.errors import FxcompressError, InputError, KernelError
from fxcompress.core.new_folder import refuse_existing
from fxcompress.core.plan import Plan
from fxcompress.core.workload import parse_workload
from fxcompress.evaluation import command as evaluation
from fxcompress.hf import batches_of, load_model, save_model
from fxcompress.module_mode import apply


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 wrong usage."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO if options.verbose else logging.WARNING, format="%(name)s: %(message)s"
    )
    try:
        options.run(options)
    except (FxcompressError, OSError) as error:
        print(f"fxcompress: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fxcompress: stopped; nothing was written.", file=sys.stderr)
        return 130
    return 0


def _compress(options: argparse.Namespace) -> None:
    budget = _budget(options)  # before minutes are spent
    workload = None if options.workload is None else parse_workload(options.workload)
    refuse_existing(Path(options.out))
    model = load_model(options.model)
    plan = Plan.load(options.plan) if options.plan else None
    compiled = compile(
        model,
        budget if plan is None else None,
        calibration=_calibration(options, model),
        rewrites=options.rewrites,
        plan=plan,
        progress=not options.quiet,
        workload=workload,
    )
    if options.modules:
        save_model(apply(model, compiled), options.model, options.out)
    else:
        save(compiled, options.out)
    report = compiled.meta["report"]
    _print(options, {"out": str(options.out), "report": report.to_json()}, f"{report}\n\nwritten to {options.out}")


def _plan(options: argparse.Namespace) -> None:
    budget = _budget(options)
    workload = None if options.workload is None else parse_workload(options.workload)
    model = load_model(options.model)
    plan = plan_only(
        model,
        budget,
        calibration=_calibration(options, model),
        rewrites=options.rewrites,
        progress=not options.quiet,
        lower=options.lower,
        workload=workload,
    )
    if options.save:
        plan.save(options.save)
    if options.html:
        Path(options.html).write_text(plan.to_html(), encoding="utf-8")
    _print(options, plan.to_json(), plan.explain(options.explain) if options.explain else str(plan))


def _inspect(options: argparse.Namespace) -> None:
    compiled = load(options.folder)
    if options.kernels:
        _print(options, [kernel.to_json() for kernel in compiled.kernels], str(compiled.kernels))
        return
    if options.cost:
        cost = cost_of(compiled)
        cost = cost.at(**_sizes(options.at, cost.symbols)) if options.at else cost
        _print(options, cost.to_json(), str(cost))
        return
    plan, report = compiled.meta["plan"], compiled.meta["report"]
    if options.html:
        Path(options.html).write_text(plan.to_html(report), encoding="utf-8")
    if options.explain:
        _print(
            options, [c for c in plan.to_json()["candidates"] if c[0] == options.explain], plan.explain(options.explain)
        )
        return
    _print(options, {"plan": plan.to_json(), "report": report.to_json()}, f"{plan}\n\n{report}")


def _eval(options: argparse.Namespace) -> None:
    found = evaluation.run(options)
    _print(options, found.to_json(), str(found))


def _budget(options: argparse.Namespace) -> Budget:
    """A size of 4x where nothing is asked."""
    size = options.budget or (None if options.latency else "4x")
    return Budget(size=size, latency=options.latency)


def _sizes(text: str, symbols: Sequence[str]) -> dict[str, int]:
    """"s0=8,s1=128" as sizes of some of `symbols`."""
    pairs = [pair.strip().partition("=") for pair in text.split(",")]
    if any(name not in symbols or not size.isdecimal() or int(size) < 1 for name, _, size in pairs):
        wanted = ",".join(f"{name}=8" for name in symbols)
        raise InputError(f"--at {text}: write sizes of {', '.join(symbols)}, such as {wanted}.")
    return {name: int(size) for name, _, size in pairs}


def _catalogue(arch: int) -> Any:
    """The module, where Triton is installed and knows the card."""
    try:
        from fxcompress.codegen.triton import catalogue
    except ImportError as error:
        raise KernelError(
            f"kernels are compiled by Triton, which cannot be imported here ({error}): "
            "pip install 'fxcompress[triton]'."
        ) from error
    if arch not in catalogue.TENSOR_CORES:
        known = ", ".join(map(str, catalogue.TENSOR_CORES))
        raise KernelError(f"--arch {arch}: kernels can be compiled for {known} (90 is sm_90, an H100 or H200).")
    return catalogue


def _kernels(options: argparse.Namespace) -> None:
    catalogue = _catalogue(options.arch)
    rows = list(catalogue.compile_all(options.arch))
    data = [
        {"kernel": row.entry.name, "function": row.launch.form, "config": asdict(row.config),
         "registers": row.report.registers, "spill_bytes": row.report.spill_bytes,
         "shared_bytes": row.report.shared_bytes, "instructions": dict(row.report.instructions),
         "bound": row.bound, "faults": row.faults}
        for row in rows
    ]  # fmt: skip
    left_out = catalogue.left_out(options.arch)
    text = "\n".join([catalogue.table(rows), *(f"left out: {clause}" for clause in left_out)])
    _print(options, {"arch": options.arch, "kernels": data, "left_out": left_out}, text)
    faulty = [f"{row.entry.name} {'; '.join(row.faults)}" for row in rows if row.faults]
    if faulty:
        raise KernelError(f"{len(faulty)} of {len(rows)} kernels are at fault: {'. '.join(faulty)}.")


def _tune(options: argparse.Namespace) -> None:
    entries = _catalogue(options.arch).ENTRIES
    if options.seed == bool(options.folder):
        raise KernelError("tune takes either the folder of a compressed model, or --seed.")
    if options.seed:
        _seed(options, entries)
        return
    import torch

    from fxcompress.codegen.triton import timing, tune
    from fxcompress.codegen.triton.card import card_of
    from fxcompress.codegen.triton.configs import own_table

    if min(options.tokens) < 1:
        raise KernelError(f"--tokens {min(options.tokens)}: numbers of tokens are 1 or more.")
    device = timing.need_cuda("tuning")
    card, cache = card_of(device), torch.cuda.get_device_properties(device).L2_cache_size
    model = load(options.folder).to(device)
    found = tune.tune_model(model, options.tokens, card, cache, timing.measure, not options.quiet)
    if not found:
        raise KernelError(f"{options.folder} has no fused node that there is a kernel for; there is nothing to tune.")
    path = own_table(card.name)
    data = [{**asdict(one), "key": list(one.key)} for one in found]
    _print(options, {"out": str(path), "found": data}, f"{tune.table(found)}\n\nwritten to {path}")


def _seed(options: argparse.Namespace, entries: Any) -> None:
    import triton
    from tqdm import tqdm

    from fxcompress.codegen.triton import seed

    each = seed.seeds(options.arch, entries)
    found = list(tqdm(each, "seed", unit="kernel", disable=options.quiet, leave=False))
    print(json.dumps(seed.table(found, options.arch, triton.__version__), indent=1, sort_keys=True))


def _profile(options: argparse.Namespace) -> None:
    made = profiling.profile(progress=not options.quiet)
    path = profiling.cached_path()
    if options.out:
        made.save(options.out)
        path = Path(options.out)
    _print(options, made.to_json(), f"{profiling.table(made)}\n\nwritten to {path}")


def _calibration(options: argparse.Namespace, model: Any) -> Any:
    if options.calibration is None:
        print(
            "fxcompress: no --calibration: weights are rounded in their own metric, and errors are guesses.",
            file=sys.stderr,
        )
        return None
    return batches_of(options.model, model, Path(options.calibration), options.examples, options.batch_size)


def _print(options: argparse.Namespace, data: Any, text: str) -> None:
    print(json.dumps(data) if options.json else text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fxcompress", description="Make a trained network smaller; keep its answers.")
    parser.add_argument("--version", action="version", version=f"fxcompress {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print JSON instead of text")
        sub.add_argument("--verbose", action="store_true", help="log what is being done, on stderr")
        return sub

    compress = command("compress", _compress, "compress a Hugging Face model folder")
    plan = command("plan", _plan, "choose the rewrites for a budget and print them; write no model")
    inspect = command("inspect", _inspect, "print the plan and the report of a compressed folder")
    evaluation.add_arguments(command("eval", _eval, "measure a folder on labelled lines or text, beside the original"))
    cli_export.add(command)
    kernels = command("kernels", _kernels, "compile every kind of Triton kernel for a GPU that need not be here")
    kernels.add_argument("--arch", type=int, default=90, help="compute capability, 90 for sm_90 (default)")
    tune = command("tune", _tune, "measure launch configs for a compressed folder on this GPU, once and for all")
    tune.add_argument("folder", nargs="?", metavar="DIR", help="folder written by `fxcompress compress`")
    tune.add_argument(
        "--tokens", nargs="+", type=int, default=[1, 16, 64, 256, 1024], help="numbers of tokens (1 16 64 256 1024)"
    )
    tune.add_argument("--seed", action="store_true", help="without a GPU: predict a table for all kinds, and print it")
    tune.add_argument("--arch", type=int, default=90, help="of --seed: compute capability (default 90)")
    tune.add_argument("--quiet", action="store_true", help="no progress bars")
    profile = command("profile", _profile, "measure this machine's kernels, in two minutes, for `lower` and latencies")
    profile.add_argument("--out", metavar="FILE", help="also write the profile here, as JSON")
    profile.add_argument("--quiet", action="store_true", help="no progress bar")
    for sub in (compress, plan):
        sub.add_argument("model", metavar="MODEL_DIR", help="folder written by save_pretrained, with its tokenizer")
        sub.add_argument("--budget", help='size: "4x", "25%%", "12 MB" (default 4x, or free where --latency is given)')
        sub.add_argument(
            "--latency", help='of a call, lowered to this CPU: "2x", "50%%", "12 ms", or "min" beside --budget'
        )
        sub.add_argument(
            "--workload",
            nargs="+",
            metavar="NAME=BATCHxSEQUENCE[:CALLS]",
            help="what latency is of, such as decode=1x1 prefill=8x512:0.3 (default: the calibration's shape)",
        )
        sub.add_argument("--calibration", metavar="TEXTS", help="text file, one example a line")
        sub.add_argument("--examples", type=int, default=128, help="lines of it to use (default 128)")
        sub.add_argument("--batch-size", type=int, default=16, help="examples a batch (default 16)")
        sub.add_argument("--rewrites", nargs="+", metavar="NAME", help="choose from these only, e.g. quantize low_rank")
        sub.add_argument("--quiet", action="store_true", help="no progress bars")
    compress.add_argument("--out", required=True, help="folder to create")
    compress.add_argument(
        "--modules", action="store_true",
        help="write a folder for from_pretrained or SentenceTransformer, with all else that MODEL_DIR holds",
    )  # fmt: skip
    compress.add_argument("--plan", help="replay a plan saved by `fxcompress plan --save`")
    plan.add_argument("--save", help="also write the plan as JSON")
    plan.add_argument("--html", metavar="FILE", help="also write a page: Pareto front, every weight, refusals")
    plan.add_argument(
        "--lower", choices=get_args(Target), help="what seconds are predicted for (default inductor; for --latency)"
    )
    plan.add_argument("--explain", metavar="SITE", help="print every candidate of one site, and why it lost")
    inspect.add_argument("folder", metavar="DIR", help="folder written by `fxcompress compress` or fxcompress.save")
    inspect.add_argument("--explain", metavar="SITE", help="print every candidate of one site, and why it lost")
    inspect.add_argument("--html", metavar="FILE", help="write a page: Pareto front, every weight, measured seconds")
    inspect.add_argument("--kernels", action="store_true", help="print the GPU kernels it runs, and where they are")
    inspect.add_argument("--cost", action="store_true", help="print flops, bytes and launches of every module")
    inspect.add_argument("--at", metavar="SIZES", help="with --cost: numbers for these sizes, such as s0=8,s1=128")
    return parser


if __name__ == "__main__":
    sys.exit(main())
