"""Which launch config serves a kernel at a number of tokens, on a card.

    table      codegen/triton/configs/<card>.json, and the user's own of `fxcompress tune`, which comes first
    key        what the kernel is ("linear[int4 g128] bfloat16"), then its size ("8192x8192"), then tokens up to
    value      a config, or null: unpack the weight once and let the library multiply

What no table names goes by the kernel's own rule (`Kernel.rule`). The size "*", of tables that were predicted
(fxcompress.codegen.triton.seed), amends it: rows of a tile, warps and stages are the table's, all else the rule's.
Nothing is timed at a first call.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fxcompress.codegen.triton.build import cache_folder, write_whole
from fxcompress.codegen.triton.card import Card
from fxcompress.codegen.triton.kernel import Config, Kernel

log = logging.getLogger("fxcompress.kernels")

BUCKETS = (16, 32, 64, 128, 256, 1024)  # tokens up to; beyond the last, the last
ANY = "*"  # size
_SHIPPED = Path(__file__).parent / "configs"

Table = dict[str, dict[str, dict[str, Any]]]  # label -> size -> bucket -> config


def choose(kernel: Kernel, tokens: int, card: Card) -> Config | None:
    """The config, or None where the fused kernel is not what is fastest."""
    if not kernel.forms:  # nothing of it fits a chip
        return None
    at = str(bucket(tokens))
    sizes = _table(card.name).get(kernel.label, {})
    own = sizes.get(size_of(kernel), {})
    if at in own:
        return None if own[at] is None else Config(**own[at])
    return _amended(kernel.rule(tokens, card.multiprocessors), sizes.get(ANY, {}).get(at))


def _amended(rule: Config | None, seeded: Mapping[str, int] | None) -> Config | None:
    """Narrower tiles are more of them, so fewer ways to split."""
    if rule is None or seeded is None:
        return rule
    block_n = seeded["block_n"]
    split = max(1, rule.split * block_n // rule.block_n)
    return replace(rule, block_n=block_n, split=split, warps=seeded["warps"], stages=seeded["stages"])


def size_of(kernel: Kernel) -> str:
    """As tables write it."""
    return f"{kernel.rows}x{kernel.columns}"


def bucket(tokens: int) -> int:
    """The bucket of a number of tokens."""
    return next((most for most in BUCKETS if tokens <= most), BUCKETS[-1])


def own_table(card: str) -> Path:
    """Where `fxcompress tune` writes."""
    return cache_folder() / "configs" / f"{_file(card)}.json"


def remember(card: str, label: str, size: str, found: Mapping[int, Config | None], told: Mapping[str, str]) -> Path:
    """Add what was measured to the user's table; `told` says of which device, versions and day."""
    path = own_table(card)
    table = _read(path) if path.is_file() else {}
    entries = table.setdefault("configs", {}).setdefault(label, {}).setdefault(size, {})
    entries.update({str(at): None if config is None else asdict(config) for at, config in found.items()})
    write_whole(path, json.dumps({**table, **told, "device": card}, indent=1, sort_keys=True) + "\n")
    _table.cache_clear()
    return path


@functools.cache
def _table(card: str) -> Table:
    merged: Table = {}
    for path in (_SHIPPED / f"{_file(card)}.json", own_table(card)):
        if path.is_file():
            for label, sizes in _read(path).get("configs", {}).items():
                for size, entries in sizes.items():
                    merged.setdefault(label, {}).setdefault(size, {}).update(entries)
    return merged


def _read(path: Path) -> dict[str, Any]:
    """A damaged table costs speed, no answers: it is left out, and named."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        for sizes in table["configs"].values():
            for entries in sizes.values():
                for config in entries.values():
                    if config is not None:
                        Config(**config)
        return dict(table)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is no table of launch configs (%s) and is not used; `fxcompress tune` writes it.", path, error)
        return {}


def _file(card: str) -> str:
    return re.sub(r"\W+", "_", card).strip("_")
