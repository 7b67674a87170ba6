"""A few rows that stand for all: the estimate itself, and every claim that rests on one."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import fxcompress
from fxcompress import api
from fxcompress.api import plan_only
from fxcompress.core.budget import Budget
from fxcompress.core.calibrate import thinned
from fxcompress.core.held import Many
from fxcompress.core.metric import local_error, stand_ins
from fxcompress.core.rewrite import Structure
from fxcompress.core.sample import draw
from fxcompress.core.site import Statistics, find_sites
from fxcompress.cost_model.sensitivity import Prober
from fxcompress.passes import REWRITES, probes
from fxcompress.passes.block_low_rank import BlockLowRank
from fxcompress.passes.low_rank import LowRank
from fxcompress.passes.monarch import Monarch
from fxcompress.passes.propose import trials_of
from fxcompress.passes.quantize import DRAWS, TABLE_DRAWS, Quantize
from fxcompress.passes.quantize_rows import QuantizeRows
from fxcompress.passes.recipe import Recipe
from fxcompress.passes.tensor_train import TensorTrain
from tests.sites import moment_of, normal, site_of, weight_of


def held_out(columns):
    """Moments of a fit and of a check that differ as two samples do."""
    mean = normal(columns, seed=3).double() / 4
    shift = torch.outer(mean, mean)
    fit, check = moment_of(columns, seed=1) + shift, 1.1 * moment_of(columns, seed=1) + 0.1 * moment_of(columns, seed=2)
    return Statistics(fit, mean, Many(check + shift, mean * 0.9))


def test_all_rows_stand_for_themselves():
    costs, values = torch.rand(20, dtype=torch.float64), torch.rand(20, dtype=torch.float64)
    sample = draw(costs, 20)
    assert sample.total(values) == pytest.approx(float(values.sum()), rel=1e-12)
    assert sample.standard_error(values) == 0.0


def test_what_is_as_its_cost_is_told_exactly():
    costs = torch.logspace(0, 40, 1000, dtype=torch.float64)
    sample = draw(costs, 50)
    assert len(sample.rows) < 50  # the last rows are drawn again and again
    assert sample.total(costs[sample.rows] * 3) == pytest.approx(3 * float(costs.sum()), rel=1e-9)


def test_a_row_that_is_most_of_it_is_always_there():
    costs = torch.ones(1000, dtype=torch.float64)
    costs[777] = 100.0
    assert 777 in draw(costs, 20).rows.tolist()


def test_the_standard_error_is_what_estimates_differ_by():
    generator, off = torch.Generator().manual_seed(0), []
    costs = torch.rand(4000, dtype=torch.float64, generator=generator) + 0.1
    for _ in range(200):
        values = costs * (1 + 0.3 * torch.randn(4000, dtype=torch.float64, generator=generator))
        sample = draw(costs, 100)
        mine = values[sample.rows]
        off.append((sample.total(mine) - float(values.sum())) / sample.standard_error(mine))
    # 200 of mean 0 and deviation 1: three deviations of each.
    assert abs(float(torch.tensor(off).mean())) < 3 / 200**0.5
    assert float(torch.tensor(off).std()) == pytest.approx(1, abs=3 / 400**0.5)


@pytest.mark.parametrize("kind", ["linear", "embedding", "tied"])
def test_what_each_setting_of_a_large_weight_loses(kind):
    p = torch.arange(1500, 0, -1, dtype=torch.float64) ** 1.5
    known = {
        "linear": {"second_moment": moment_of(96)},
        "embedding": {"row_weight": p / p.sum(), "column_metric": moment_of(96)},
        "tied": {"second_moment": moment_of(96), "row_weight": p / p.sum(), "column_metric": moment_of(96, seed=4)},
    }[kind]
    site = site_of(weight_of((1500, 96)) * torch.linspace(0.3, 3, 1500).unsqueeze(1), kind, **known)
    assert site.rows > DRAWS
    for q, claimed in Quantize.dense_errors(site).items():
        # 1.4 % is the deviation on MiniLM's weights; four of it.
        assert local_error(site, q.dense_weight(site)) == pytest.approx(claimed, rel=0.056), str(q)


def test_what_each_setting_of_a_trained_weight_loses(data):
    from benchmarks.models import minilm

    layer = data(minilm.model).encoder.layer[2]
    for linear in (layer.intermediate.dense, layer.output.dense):
        weight = linear.weight.detach()
        site = site_of(weight, second_moment=moment_of(weight.shape[1]))
        for q, claimed in Quantize.dense_errors(site).items():
            assert local_error(site, q.dense_weight(site)) == pytest.approx(claimed, rel=0.056), str(q)


@pytest.mark.parametrize("structure", [LowRank(24), BlockLowRank(2, 12), Monarch(2, 12), TensorTrain(16)], ids=str)
def test_what_structures_lose_where_few_rows_are_most_of_the_signal(structure):
    """As in MiniLM's weights of 1536 columns: draws by signal alone hardly see the rows that lose."""
    weight = normal(1200, 96)
    weight[::150] = 30 * (normal(8, 4) @ normal(4, 96))  # large, and simple
    site = site_of(weight, second_moment=moment_of(96))
    told = Structure.unstored_error(structure, site)
    # 3 % is the largest deviation of one of these on MiniLM's and a BERT's weights; three of it.
    assert local_error(site, structure.unstored(site)) == pytest.approx(told, rel=0.09)


def test_row_tiers_of_a_large_table_whose_rare_rows_are_unlike_the_frequent_ones():
    p = torch.arange(1, 8001, dtype=torch.float64) ** -1.2
    weight = normal(8000, 64) * torch.linspace(0.5, 2, 8000).unsqueeze(1)
    weight[4000:, ::16] *= 6  # rare rows have outliers, which few bits do not reach
    site = site_of(weight, "embedding", row_weight=p / p.sum(), column_metric=moment_of(64))
    assert site.rows > TABLE_DRAWS
    claims = list(QuantizeRows.dense_errors(site).items())
    for q, claimed in claims[::4]:
        assert local_error(site, q.dense_weight(site)) == pytest.approx(claimed, rel=0.056), str(q)


def test_a_rough_rounding_is_somewhat_worse_and_no_more():
    site = site_of(weight_of((300, 128)), second_moment=moment_of(128))
    every = torch.arange(300)
    for q in (Quantize(2, 64), Quantize(4, 32), Quantize(8, 0)):
        rough, made = (local_error(site, w) for w in (q.probe_rows(site, every), q.dense_weight(site)))
        assert made < rough < 2 * made


@pytest.mark.parametrize("shape", [(320, 96), (96, 320)])
@pytest.mark.parametrize("family", [BlockLowRank, Monarch])
def test_rows_of_a_grid_of_blocks_are_those_of_the_whole(family, shape):
    site = replace(site_of(weight_of(shape)), statistics=held_out(shape[1]), _analyses={})
    rows = torch.tensor([0, 3, 50, 51, 95])
    for structure in family.space(site):
        whole = structure.unstored(site)
        torch.testing.assert_close(structure.unstored_rows(site, rows), whole[rows].float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(320, 96), (96, 320)])
@pytest.mark.parametrize("bias", [None, torch.ones(1)])
def test_low_rank_knows_its_held_out_error_in_closed_form(shape, bias):
    bias = None if bias is None else bias.expand(shape[0]).clone()
    site = replace(site_of(weight_of(shape), bias=bias), statistics=held_out(shape[1]), _analyses={})
    for structure in LowRank.space(site):
        assert structure.unstored_error(site) == pytest.approx(local_error(site, structure.unstored(site)), rel=1e-3)


def test_low_rank_of_a_table_too():
    p = torch.arange(700, 0, -1, dtype=torch.float64)
    known = {"row_weight": p / p.sum(), "column_metric": moment_of(64)}
    for kind, more in (("embedding", {}), ("tied", {"second_moment": moment_of(64, seed=5)})):
        site = site_of(weight_of((700, 64)), kind, **known, **more)
        for structure in (LowRank(8), LowRank(40)):
            want = local_error(site, structure.unstored(site))
            # A tied table is judged by some of its rows.
            assert structure.unstored_error(site) == pytest.approx(want, rel=1e-3 if kind == "embedding" else 0.1)


def test_what_is_inferred_between_two_that_are_made():
    site = replace(site_of(weight_of((256, 320))), statistics=held_out(320), _analyses={})
    ((_, trials, _),) = trials_of([site], REWRITES, Budget("4x"))
    factored = [t for t in trials if isinstance(t.recipe.structure, LowRank) and t.recipe.storage is not None]
    assert len(factored) > 4  # else there is nothing between
    for trial in factored:
        assert trial.recipe.error(site, trial.recipe.make(site).weight) == pytest.approx(trial.error, rel=0.02)


@pytest.mark.parametrize("grid", [BlockLowRank, Monarch])
def test_the_error_of_a_block_grid_is_looked_at_from_below(grid):
    site = replace(site_of(weight_of((320, 96))), statistics=held_out(96), _analyses={})
    structure = grid(4, 6)
    rising = [*structure.rising_errors(site)]
    assert len(rising) == 5  # a bound that costs nothing, then a block row more each
    assert all(a < b for a, b in pairwise(rising))
    assert rising[-1] == pytest.approx(structure.unstored_error(site), rel=1e-6)


class Reader(torch.nn.Module):
    """A vocabulary that is looked up and multiplied."""

    def __init__(self):
        super().__init__()
        self.table, self.out = torch.nn.Embedding(6000, 64), torch.nn.Linear(64, 32)

    def forward(self, ids):
        return torch.tanh(self.out(self.table(ids)))


def test_of_a_vocabulary_only_the_rows_that_are_read_are_probed(monkeypatch):
    torch.manual_seed(0)
    rare = (torch.rand(24, 8, 12, generator=torch.Generator().manual_seed(1)) ** 3 * 6000).long()
    gm, known = api.observe(Reader().eval(), None, [*rare], False)
    site = known.informed(find_sites(gm)[0])
    prober = Prober(gm, known.held_out)
    read, every = prober.rows_read(site), torch.arange(6000)
    assert read.tolist() == sorted({int(i) for args, _ in known.held_out for i in args[0].flatten()})
    assert torch.equal(prober.rows_read(known.informed(find_sites(gm)[1])), torch.arange(32))
    ((_, trials, _),) = trials_of([site], REWRITES, Budget("4x"))
    monkeypatch.setattr(probes, "AT_HAND", 0)
    made = probes.probes_of(site, trials)
    whole, some = ({p.family: p for p in made(rows)} for rows in (every, read))
    assert {"quantize", "quantize_rows", "factors"} <= set(whole) == set(some)
    drawn = site.analysis(stand_ins).rows
    untouched = torch.isin(every, torch.cat([read, drawn]), invert=True)
    for family, probe in some.items():
        assert torch.equal(probe.weight[untouched], site.weight[untouched])
        losses = [prober.loss(site, p.weight, p.bias) for p in (whole[family], probe)]
        assert losses[1] == pytest.approx(losses[0], rel=0.03), family
        # 256 draws; they told MiniLM's three within 4.5 %.
        assert probe.error == pytest.approx(whole[family].error, rel=0.1), family


class ReadsTwice(Reader):
    """The second time by what it made of the first."""

    def forward(self, ids):
        first = super().forward(ids)
        return first + self.out(self.table(first.argmax(-1)))


def test_of_a_vocabulary_that_is_read_by_what_was_read_every_row_is_probed():
    torch.manual_seed(0)
    batches = [torch.randint(6000, (8, 12), generator=torch.Generator().manual_seed(n)) for n in range(8)]
    gm, known = api.observe(ReadsTwice().eval(), None, batches, False)
    site = find_sites(gm)[0]
    assert len(site.uses) == 2
    assert torch.equal(Prober(gm, known.held_out).rows_read(site), torch.arange(6000))


def test_probes_take_a_share_of_the_examples_few_calls_at_a_time():
    calls = [((torch.arange(n), torch.zeros(n, width)), {}) for n, width in ((8, 3), (8, 4), (8, 5), (8, 6))]
    taken = {share: [tuple(args[1].shape) for args, _ in thinned(calls, share)] for share in (0.01, 0.1, 0.25, 0.5)}
    assert taken == {0.01: [(1, 3)], 0.1: [(3, 3)], 0.25: [(4, 3), (4, 6)], 0.5: [(4, 3), (4, 4), (4, 5), (4, 6)]}
    ((args, _), *_) = thinned(calls, 0.25)
    assert args[0].tolist() == [0, 1, 2, 3]
    assert thinned(calls, 1.5) == calls
    single = [((torch.zeros(1, n),), {}) for n in (3, 4, 5, 6)]
    assert thinned(single, 0.3) == single[:2]


def test_a_recipe_is_made_once_however_many_rounds_a_size_takes(monkeypatch):
    made = []
    own = Recipe.make
    monkeypatch.setattr(Recipe, "make", lambda self, site: made.append((site.name, str(self))) or own(self, site))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 256), torch.nn.GELU(), torch.nn.Linear(256, 96)).eval()
    batches = [normal(64, 96, seed=seed) for seed in range(3)]
    plan = plan_only(model, "4x", calibration=batches, progress=False)
    made.clear()
    short = replace(plan, fixed_bytes=plan.fixed_bytes - 4000)  # the first size measured is too large
    compiled = fxcompress.compile(model, "5x", plan=short, calibration=batches, progress=False)
    assert compiled.report.measured_bytes <= compiled.report.original_bytes / 5
    assert len(made) == len(set(made))
    assert len(made) > 2  # there was a second round, and another choice
