"""What one machine's kernels take, measured once; seconds of any size are read between the sizes measured.

    seconds(s) = exp(multilinear interpolation of log seconds in log s)         s = (tokens, rows, columns), ...

Beyond the largest size of an axis, seconds grow with that size (by rate); below the smallest they stay (a launch).

    products     the bare library call y (tokens, rows) = x (tokens, columns) W^T, three times: W in the second-level
                 caches (hot), in the last-level cache (cached), in memory (streamed). A model's weights lie between
                 two calls of the same product: `working_set` bytes. From half a cache to twice a cache, seconds go
                 from what they are inside it to what they are outside, by the logarithm.
    passes       what stands between products, over (rows, columns), for each target: "eager.add", "inductor.norm";
                 compiled ones without their launch
    attention    over (batch x heads, positions, size of a head)
    overheads    seconds of a call of the module, of an input, a node, a loop ..., for each target, three times: the
                 weights take the place of the interpreter's code and objects, too
    fused        what passes take in one compiled loop, over the sum of them alone, by elements: what is not written

A profile knows its own error: median and 90th percentile of |predicted / measured - 1| on shapes off the grid.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from fxcompress.core.errors import ProfileError

FORMAT = 2
Target = Literal["eager", "inductor"]
PRODUCTS = ("float", "bf16", "int8", "int8_weight", "int4_weight")
AROUND: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # passes over x, passes over y
    "float": ((), ()),
    "bf16": (("cast",), ("cast",)),
    "int8": (("round",), ("scale",)),
    "int8_weight": (("cast",), ("cast",)),
    "int4_weight": (("cast",), ("cast",)),
}


@dataclass(frozen=True)
class Grid:
    """Seconds over the product of axes of growing sizes, last axis fastest; None where a size took too long."""

    axes: tuple[tuple[int, ...], ...]
    seconds: tuple[float | None, ...]

    def __post_init__(self) -> None:
        if len(self.seconds) != math.prod(map(len, self.axes)) or any(s is not None and s <= 0 for s in self.seconds):
            raise ValueError(f"{len(self.seconds)} seconds for axes of {[len(a) for a in self.axes]} sizes")

    def at(self, *sizes: float) -> float:
        """Interpolated, or extrapolated as the module says."""
        places, beyond = [], 1.0
        for axis, size in zip(self.axes, sizes, strict=True):
            size = max(float(size), axis[0])
            beyond *= max(size / axis[-1], 1.0)
            places.append(_between([math.log(a) for a in axis], math.log(min(size, axis[-1]))))
        total = 0.0
        for corner in itertools.product((0, 1), repeat=len(places)):
            share = math.prod(f if c else 1 - f for c, (_, f) in zip(corner, places))
            if share:
                total += share * self._logs[tuple(i + c for c, (i, _) in zip(corner, places))]
        return math.exp(total) * beyond

    @cached_property
    def _logs(self) -> dict[tuple[int, ...], float]:
        """Of every point; one that took too long grows by rate from its smaller neighbours."""
        known: dict[tuple[int, ...], float] = {}
        for place, seconds in zip(itertools.product(*(range(len(a)) for a in self.axes)), self.seconds):
            if seconds is not None:
                known[place] = math.log(seconds)
                continue
            smaller = [((*place[:d], i - 1, *place[d + 1 :]), self.axes[d][i] / self.axes[d][i - 1])
                       for d, i in enumerate(place) if i]  # fmt: skip
            known[place] = max(known[at] + math.log(ratio) for at, ratio in smaller)
        return known


def _between(axis: list[float], value: float) -> tuple[int, float]:
    """The place before a value, and how far it is towards the next."""
    i = max(0, min(sum(1 for a in axis if a <= value) - 1, len(axis) - 2))
    return (i, (value - axis[i]) / (axis[i + 1] - axis[i])) if len(axis) > 1 else (0, 0.0)


def _outside(working_set: float, cache: int) -> float:
    """0 while the weights fit a cache, 1 when they do not."""
    if working_set <= 0:
        return 0.0
    return min(max(math.log(2 * working_set / cache) / math.log(4), 0.0), 1.0)


def _blend(near: float, far: float, share: float) -> float:
    return math.exp((1 - share) * math.log(near) + share * math.log(far))


@dataclass(frozen=True)
class DeviceProfile:
    """products, overheads: {name: (hot, cached, streamed)}. caches: bytes of all second-level caches, and of the last
    one. error: (median, 90th percentile) of its own predictions. pulse: seconds of standard kernels meanwhile
    (fxcompress.codegen.cpu.pulse)."""

    device: str
    threads: int
    versions: Mapping[str, str]
    date: str
    caches: tuple[int, int]
    products: Mapping[str, tuple[Grid, ...]]
    passes: Mapping[str, Grid]
    attention: Mapping[str, Grid]
    overheads: Mapping[str, tuple[float, ...]]
    fused: Grid
    error: tuple[float, float]
    pulse: Mapping[str, float]

    def bare_seconds(
        self, kernel: str, tokens: float, rows: int, columns: int, *, working_set: float = 0
    ) -> float:
        """Of the library call alone."""
        levels = [grid.at(tokens, rows, columns) for grid in self.products[kernel]]
        return self._level(levels, working_set)

    def overhead(self, name: str, working_set: float = 0) -> float:
        """Seconds of "inductor.call" and others."""
        return self._level(self.overheads[name], working_set)

    def _level(self, levels: Sequence[float], working_set: float) -> float:
        """Between the three that were measured."""
        hot, cached, streamed = levels
        near, far = (_outside(working_set, cache) for cache in self.caches)
        return _blend(_blend(hot, cached, near), streamed, far)

    def product_seconds(
        self, kernel: str, tokens: float, rows: int, columns: int, *,
        target: Target = "inductor", working_set: float = 0,
    ) -> float:  # fmt: skip
        """Of a product with all that a lowered graph does for it: rounding x, the call, scaling y."""
        before, after = AROUND[kernel]
        around = sum(self.pass_seconds(name, tokens, columns, target) for name in before)
        around += sum(self.pass_seconds(name, tokens, rows, target) for name in after)
        if around and target == "inductor":  # one loop between two library calls
            around += self.overhead("inductor.kernel", working_set)
        bare = self.bare_seconds(kernel, tokens, rows, columns, working_set=working_set)
        return bare + around

    def pass_seconds(self, name: str, rows: float, columns: float, target: Target) -> float:
        """Of one pass: alone, with its dispatch, in eager; its share of a fused loop, without the launch, compiled."""
        return self.passes[f"{target}.{name}"].at(rows, columns) * (
            1.0 if target == "eager" else self.fused.at(min(rows * columns, self.fused.axes[0][-1]))
        )

    def attention_seconds(self, name: str, heads: float, positions: float, size: float) -> float:
        """Of attention of (batch x heads, positions, size)."""
        return self.attention[name].at(heads, positions, size)

    @property
    def name(self) -> str:
        """Of its file, without the end."""
        return file_name(self.device, self.threads, self.versions)

    def to_json(self) -> dict[str, Any]:
        """Numbers with four digits: seconds are not known better."""
        return {"format": FORMAT, **_rounded(asdict(self))}

    @staticmethod
    def from_json(data: Any) -> DeviceProfile:
        """Raises `ProfileError` for anything that `to_json` did not make."""
        try:
            if data["format"] != FORMAT:
                raise ProfileError(
                    f"this profile has format {data['format']}, and {FORMAT} is read; run fxcompress profile."
                )
            return DeviceProfile(
                **{key: data[key] for key in ("device", "threads", "date")},
                caches=(data["caches"][0], data["caches"][1]),
                versions=dict(data["versions"]),
                products={name: (_grid(h), _grid(c), _grid(s)) for name, (h, c, s) in data["products"].items()},
                passes={name: _grid(g) for name, g in data["passes"].items()},
                attention={name: _grid(g) for name, g in data["attention"].items()},
                overheads={name: (h, c, s) for name, (h, c, s) in data["overheads"].items()},
                fused=_grid(data["fused"]),
                error=(data["error"][0], data["error"][1]),
                pulse=dict(data["pulse"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            if isinstance(error, ProfileError):
                raise
            raise ProfileError(f"this is no profile of a device ({error!r}); run fxcompress profile.") from error

    def save(self, path: str | Path) -> None:
        """As JSON, one table a line."""
        Path(path).write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """The JSON of `save`."""
        data = self.to_json()
        lines = []
        for key, value in data.items():
            if isinstance(value, dict) and key not in ("versions", "overheads"):
                rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(table)}" for name, table in value.items())
                lines.append(f" {json.dumps(key)}: {{\n{rows}\n }}")
            else:
                lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @staticmethod
    def load(path: str | Path) -> DeviceProfile:
        """A profile of any device. Raises `ProfileError`."""
        try:
            return DeviceProfile.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ProfileError(f"{path} cannot be read as a profile ({error}); run fxcompress profile.") from error

    def check_here(self) -> None:
        """Raises `ProfileError` unless it was measured on such a machine, with so many threads and these versions."""
        here = {"device": device_name(), "threads": torch.get_num_threads(), **versions()}
        mine = {"device": self.device, "threads": self.threads, **self.versions}
        wrong = [f"{key} {mine.get(key)!r}, and here it is {here[key]!r}" for key in here if mine.get(key) != here[key]]
        if wrong:
            raise ProfileError(f"the profile is of {'; of '.join(wrong)}: run fxcompress profile on this machine.")


def file_name(device: str, threads: int, versions: Mapping[str, str]) -> str:
    """"AMD_EPYC_25.17.1_AVX512_VNNI_BF16_2t_torch2.13.0_cpu" """
    told = "_".join(f"{name}{version}" for name, version in sorted(versions.items()))
    return re.sub(r"[^\w.]+", "_", f"{device}_{threads}t_{told}").strip("_")


def device_name() -> str:
    """The processor: model, family and number, and what torch uses of it. "AMD EPYC" alone is many processors."""
    told: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if not line.strip():
                break
            told[key.strip()] = value.strip()
    except OSError:
        told["model name"] = os.uname().machine if hasattr(os, "uname") else "CPU"
    number = ".".join(told[key] for key in ("cpu family", "model", "stepping") if key in told)
    capability = [torch.backends.cpu.get_cpu_capability()]
    capability += ["VNNI"] if torch.cpu._is_vnni_supported() else []
    capability += ["BF16"] if torch.cpu._is_avx512_bf16_supported() else []
    return " ".join(filter(None, [told.get("model name", "CPU"), number, *capability]))


def versions() -> dict[str, str]:
    """Of the libraries that multiply."""
    return {"torch": str(torch.__version__)}


def _grid(data: Mapping[str, Any]) -> Grid:
    return Grid(tuple(map(tuple, data["axes"])), tuple(data["seconds"]))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value
