"""What the model is probed with: at each site, for each family of its recipes, a weight that loses what they lose.

    a storage's      errors like those of the storage on the dense weight
    a structure's    the structure alone, before anything is stored

One probe stands for all recipes of its family, because how much the model minds an error hardly depends on its amount
(fxcompress.cost_model.sensitivity). Of a vocabulary only the rows that the probing sentences read are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fxcompress.core.metric import row_errors, stand_ins
from fxcompress.core.rewrite import Structure
from fxcompress.core.site import Site
from fxcompress.passes.dense import Dense
from fxcompress.passes.recipe import Recipe, bias_of

MADE_EACH = 2**16  # weights of a site, up to which every recipe that is priced is made, and every family probed
AT_HAND = 2**23  # weights of a site, above which probes are made one by one: those of a vocabulary are large


@dataclass(frozen=True)
class Trial:
    """A recipe with its site error, before the model's reaction is known."""

    recipe: Recipe
    bytes: int
    structure_error: float  # squared, before storing
    error: float  # squared, in all


@dataclass(frozen=True, eq=False)
class Probe:
    """A weight that loses what its family loses, and its site error."""

    family: str
    weight: Tensor
    bias: Tensor | None
    error: float


def probes_of(site: Site, trials: Sequence[Trial]) -> Callable[[Tensor], Iterable[Probe]]:
    """The site's probes, made here and now, of all rows, where they are not too large to be kept."""
    if site.weight.numel() > AT_HAND:
        return partial(_made, site, trials)
    made = [*_made(site, trials, torch.arange(site.rows))]
    site.forget()
    return lambda rows: made


def _made(site: Site, trials: Sequence[Trial], rows: Tensor) -> Iterator[Probe]:
    """One of each family: a storage's on a dense weight, a structure's of the structure alone. Rows that are not read
    stay as they are.

    Row tiers have their own: they spare the rows the model reads. Plain 8 bits priced by them made MiniLM at 2x
    predict an error of .0084 where .0061 was measured.
    """
    families: dict[str, list[Trial]] = {}
    for trial in trials:
        structure, storage = trial.recipe.structure, trial.recipe.storage
        if trial.structure_error > 0.0:
            families.setdefault(family_of(site, type(structure)), []).append(trial)
        elif storage is not None:
            families.setdefault(storage.name, []).append(trial)
    for family, mine in families.items():
        weight, error = _lossy(site, _typical(mine), rows)
        yield Probe(family, weight, bias_of(site, weight), error)


def _lossy(site: Site, trial: Trial, rows: Tensor) -> tuple[Tensor, float]:
    """The weight with `rows` something like what they will be read back as, and the site error if all were, told from
    rows that stand for all."""
    weight, sample = site.weight.clone(), site.analysis(stand_ins)
    some = torch.unique(torch.cat([rows, sample.rows]))
    weight[some] = _lossy_rows(site, trial, some)
    return weight, sample.total(row_errors(site, sample.rows, weight[sample.rows]))


def _lossy_rows(site: Site, trial: Trial, rows: Tensor) -> Tensor:
    """In the weight's dtype; of a structure that loses something, before anything is stored."""
    structure, storage = trial.recipe.structure, trial.recipe.storage
    if trial.structure_error > 0.0:
        return structure.unstored_rows(site, rows).to(site.weight.dtype)
    if isinstance(structure, Dense) and storage is not None:
        return storage.probe_rows(site, rows).to(site.weight.dtype)
    return trial.recipe.make(site).weight[rows]


def family_of(site: Site, structure: type[Structure]) -> str:
    """Whose kappa it has. All that lose the directions in which a weight matters least share one where a probe takes
    long: they differ by 5 % (MiniLM, BERT), though by more on a grokked network, and its weights are small."""
    return structure.name if site.weight.numel() <= MADE_EACH else structure.errs_as or structure.name


def _typical(trials: Sequence[Trial]) -> Trial:
    """The one whose error is the median: neither lost in float noise nor saturated."""
    return sorted(trials, key=lambda t: t.error)[len(trials) // 2]
