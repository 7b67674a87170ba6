"""all-MiniLM-L6-v2 on a CPU: seconds of ours and of others, side by side in one run, with what each loses.

    pip install '.[bench,peers]'
    python benchmarks/latency_minilm.py [--folder my-minilm-4x] [--rounds 15] [--threads 2] [--only fxcompress,openvino]

Every round times one call of everybody in turn, so that a busy moment of the machine hits all alike; medians of the
rounds. `ratio` is OpenVINO's default (bf16 inference) over the row's time: above 1 is faster than OpenVINO.
`cosine` and `drop` are of STS-B dev embeddings against PyTorch in float32. Without --folder the model is compressed at
4x first, which takes minutes. Peers that are not installed are left out, with a line that says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxcompress
from benchmarks.models import data, minilm

SHAPES = ((1, 16), (1, 128), (32, 128))
BASE = "OpenVINO"
Run = Callable[[dict[str, Tensor]], Tensor]


def main() -> None:
    """Print a row a runtime."""
    options = arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        runs = dict(runtimes(Path(folder), options))
        inputs = [example(*shape) for shape in SHAPES]
        seconds = []
        for shape, given in zip(SHAPES, inputs):
            seconds.append(times(runs, given, options.rounds))
            medians = {name: f"{statistics.median(found) * 1e3:.2f} ms" for name, found in seconds[-1].items()}
            print(shape, medians, flush=True)
        quality = {name: judge(run) for name, (run, _) in runs.items()}
        score, reference = quality["PyTorch"]
        rows = []
        for name, (_, size) in runs.items():
            mine = [statistics.median(s[name]) for s in seconds]
            base = [statistics.median(s[BASE]) for s in seconds] if BASE in runs else [float("nan")] * len(mine)
            found, embeddings = quality[name]
            rows.append((
                name, f"{size / 1e6:.1f} MB",
                *(f"{t * 1e3:.2f} ms {b / t:5.2f}x" for t, b in zip(mine, base)),
                f"{minilm.mean_cosine(embeddings, reference):.4f}", f"{score - found:+.4f}",
            ))  # fmt: skip
    heads = ["runtime", "on disk", *(f"{b} x {s}, ratio" for b, s in SHAPES), "cosine", "STS-B drop"]
    print(f"\n{options.threads} threads, {torch.backends.cpu.get_cpu_capability()}, {options.rounds} rounds\n")
    print(tabulate(rows, headers=heads, disable_numparse=True))


def runtimes(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, tuple[Run, int]]]:
    """name -> (run, bytes on disk)."""
    model = minilm.model()
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    yield "PyTorch", (hidden(model), size)
    makers = {
        "torch.compile": lambda: (hidden(torch.compile(minilm.model(), dynamic=True)), size),
        "torch.compile bf16": lambda: (bf16(), size // 2),
        "torchao int8 dynamic": lambda: (torchao(), size // 4),
        "ONNX Runtime int8": lambda: onnx_runtime(onnx(folder)),
        "OpenVINO": lambda: openvino(onnx(folder), weights8=False),
        "OpenVINO int8 weights": lambda: openvino(onnx(folder), weights8=True),
        "fxcompress 4x": lambda: ours(options.folder),
    }
    for name, make in makers.items():
        if options.only and not any(word.lower() in name.lower() for word in options.only.split(",")):
            continue
        try:
            yield name, make()
        except ImportError as missing:
            print(f"left out: {name}, since {missing.name} is not installed", flush=True)


def ours(folder: str | None) -> tuple[Run, int]:
    """Compressed, saved, loaded, lowered."""
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            lines = [text for text, _ in data.sst2("dev")][:128]
            compiled = fxcompress.compile(minilm.model(), "4x", calibration=minilm.batches(lines))
            folder = f"{scratch}/m"
            fxcompress.save(compiled, folder)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        return hidden(fxcompress.lower(fxcompress.load(folder), to="inductor")), size


def bf16() -> Run:
    """torch.compile with frozen weights in bf16."""
    return hidden(torch.compile(minilm.model().bfloat16(), dynamic=True, options={"freezing": True}))


def torchao() -> Run:
    """int8 on both sides, as torchao's documentation has it for CPUs."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = minilm.model()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return hidden(torch.compile(model, dynamic=True, options={"freezing": True}))


def onnx(folder: Path) -> Path:
    """The model as ONNX, any batch and length."""
    path = folder / "minilm.onnx"
    if not path.exists():
        importlib.import_module("onnxscript")

        class Hidden(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = minilm.model()

            def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
                given = dict(zip(minilm.DYNAMIC, (input_ids, attention_mask, token_type_ids)))
                return self.model(**given).last_hidden_state

        names, dims = list(minilm.DYNAMIC), {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        example_inputs = tuple(example(2, 16).values())
        torch.onnx.export(
            Hidden(), example_inputs, str(path),
            dynamo=True, input_names=names, dynamic_shapes=(dims,) * 3, verbose=False,
        )
    return path


def onnx_runtime(path: Path) -> tuple[Run, int]:
    """Its dynamic int8 quantization."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    small = path.with_name("minilm8.onnx")
    quantize_dynamic(path, small, weight_type=QuantType.QInt8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(small), options)
    return lambda given: torch.from_numpy(
        session.run(None, {name: t.numpy() for name, t in given.items()})[0]
    ), small.stat().st_size


def openvino(path: Path, weights8: bool) -> tuple[Run, int]:
    """Its default (bf16 inference where the processor has it), or nncf's int8 weights."""
    import openvino

    model = openvino.Core().read_model(str(path))
    if weights8:
        import nncf

        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    saved = path.with_name(f"openvino{8 if weights8 else 16}.xml")
    openvino.save_model(model, str(saved))  # weights in 16 bits by default
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()})
    return lambda given: torch.from_numpy(
        compiled({name: t.numpy() for name, t in given.items()})[0].copy()
    ), saved.with_suffix(".bin").stat().st_size


def hidden(model: Any) -> Run:
    return lambda given: model(**given).last_hidden_state.float()


def example(batch: int, seq: int) -> dict[str, Tensor]:
    """Random words of equal length."""
    ids = torch.randint(1000, 20_000, (batch, seq), generator=torch.Generator().manual_seed(0))
    return dict(zip(minilm.DYNAMIC, (ids, torch.ones_like(ids), torch.zeros_like(ids))))


def times(runs: dict[str, tuple[Run, int]], given: dict[str, Tensor], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round; the first two calls of everybody are not counted."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, (run, _) in runs.items():
            repeats = 1 if turn < 2 else max(1, min(20, int(0.05 / max(found[name][-1] if found[name] else 1, 1e-4))))
            run(given)  # the caches are its own again
            begun = time.perf_counter()
            for _ in range(repeats):
                run(given)
            if turn >= 2:
                found[name].append((time.perf_counter() - begun) / repeats)
    return found


def judge(run: Run) -> tuple[float, Tensor]:
    """Spearman on STS-B dev, and embeddings."""
    return minilm.spearman(lambda **given: SimpleNamespace(last_hidden_state=run(given)))


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="what fxcompress.save wrote")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="comma-separated parts of names")
    return parser.parse_args()


if __name__ == "__main__":
    main()
