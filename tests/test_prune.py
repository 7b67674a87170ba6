"""The pruned structures: ops, bytes, graphs of every kind of use, refusals; and on MiniLM, which criterion wins."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import pruning_minilm
from benchmarks.models import grokking, stories, vit_mnist
from benchmarks.models.data import mnist, tinystories
from fxcompress import api
from fxcompress.codegen.ops.unmask import bits_of, mask_bytes, unmask
from fxcompress.codegen.ops.unmask_2_4 import PAIRS, pattern_bytes, patterns_of, unmask_2_4
from fxcompress.core.budget import Budget
from fxcompress.core.capture import capture
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import local_error
from fxcompress.core.rewrite import parse_spec
from fxcompress.core.site import Statistics, find_sites
from fxcompress.core.surgery import finish
from fxcompress.passes.prune import Prune
from fxcompress.passes.prune_2_4 import Prune24
from fxcompress.passes.prune_blocks import PruneBlocks
from fxcompress.passes.quantize import Quantize
from fxcompress.passes.recipe import Recipe, parse
from tests.sites import moment_of, site_of, weight_of

KNOWN = (Prune, Prune24, PruneBlocks, Quantize)
ROWWISE, BLOCKS = [Prune(0.5), Prune(0.7, "wanda")], [PruneBlocks(0.5, 4), PruneBlocks(0.25, 8)]
each = pytest.mark.parametrize("structure", [*ROWWISE, Prune24(), Prune24("magnitude"), *BLOCKS], ids=str)
STORAGES = [None, Quantize(8, 0), Quantize(4, 32)]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def masked(lead, units, kept, tile, dtype=torch.float32, seed=0):
    """keep (*lead, units), and unmask's arguments for it."""
    keep = torch.zeros(*lead, units, dtype=torch.bool)
    keep.scatter_(-1, draw(*lead, units, seed=seed).argsort(-1)[..., :kept], True)
    return keep, (bits_of(keep), draw(*lead, kept * tile, dtype=dtype), units * tile, tile)


def of_four(lead, columns, dtype=torch.float32):
    """keep (*lead, columns), and unmask_2_4's arguments for it."""
    keep = torch.zeros(*lead, columns // 4, 4, dtype=torch.bool)
    keep.scatter_(-1, draw(*lead, columns // 4, 4).argsort(-1)[..., :2], True)
    keep = keep.flatten(-2)
    return keep, (patterns_of(keep), draw(*lead, columns // 2, dtype=dtype))


LEADS = [(5,), (2, 3), (), (0,), (2, 0)]


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(("units", "kept", "tile"), [(21, 8, 1), (16, 15, 1), (3, 1, 1), (9, 4, 4), (8, 1, 3)])
def test_unmask_puts_values_where_the_bits_are(lead, units, kept, tile):
    keep, args = masked(lead, units, kept, tile)
    got = unmask(*args)
    wide = keep.repeat_interleave(tile, -1)
    assert args[0].shape == (*lead, mask_bytes(units))
    assert torch.equal(got[wide], args[1].flatten())
    assert not bool(got[~wide].any())
    assert set(torch.library.opcheck(unmask, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("columns", [4, 20, 64])
def test_unmask_2_4_puts_values_where_the_patterns_say(lead, columns):
    keep, args = of_four(lead, columns)
    got = unmask_2_4(*args)
    assert args[0].shape == (*lead, pattern_bytes(columns))
    assert torch.equal(got[keep], args[1].flatten())
    assert not bool(got[~keep].any())
    assert set(torch.library.opcheck(unmask_2_4, args).values()) == {"SUCCESS"}


def test_every_pair_has_a_code():
    keep = torch.zeros(len(PAIRS), 4, dtype=torch.bool)
    for row, pair in zip(keep, PAIRS):
        row[list(pair)] = True
    assert torch.equal(unmask_2_4(patterns_of(keep), torch.tensor([[1.0, 2.0]] * 6)) != 0, keep)
    assert sorted(PAIRS) == sorted({tuple(sorted(p)) for p in PAIRS})
    assert len(PAIRS) == 6


@pytest.mark.parametrize("op", [unmask, unmask_2_4])
@pytest.mark.parametrize("lead", [(5,), (), (0,)])
def test_gradients_reach_the_values(op, lead):
    _, args = masked(lead, 12, 5, 3, torch.float64) if op is unmask else of_four(lead, 24, torch.float64)
    args = (args[0], args[1].requires_grad_(), *args[2:])
    assert torch.autograd.gradcheck(op, args)
    assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("op", [unmask, unmask_2_4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fake_answer_is_like_the_real_one(op, dtype):
    _, args = masked((2, 5), 12, 5, 3, dtype) if op is unmask else of_four((2, 5), 24, dtype)
    real, fake = op(*args), op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


class Net(nn.Module):
    """One weight (64, 32), as each kind of use; a convolution reads it as (64, 8, 4)."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        weight = weight_of((64, 32))
        self.weight = nn.Parameter(weight.reshape(64, 8, 4) if kind == "convolution" else weight)
        self.bias = nn.Parameter(draw(64, seed=3))

    def forward(self, x):
        if self.kind == "embedding":
            return nn.functional.embedding(x, self.weight)
        if self.kind == "tied":
            return nn.functional.embedding(x, self.weight) @ self.weight.t()
        if self.kind == "convolution":
            return nn.functional.conv1d(x, self.weight, self.bias)
        return nn.functional.linear(x, self.weight, self.bias)


IDS = torch.tensor([[0, 63, 7, 3], [31, 32, 7, 1]])
INPUTS = {"linear": draw(5, 3, 32), "convolution": draw(3, 8, 9), "embedding": IDS, "tied": IDS}


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("kind", INPUTS)
@each
def test_the_graph_computes_with_the_pruned_weight(structure, kind, storage):
    net, x = Net(kind), INPUTS[kind]
    gm = capture(net, (x,))
    (site,) = find_sites(gm)
    assert site.kind == kind
    p = torch.arange(1, 65, dtype=torch.float64)
    site = replace(
        site,
        statistics=Statistics(
            second_moment=None if kind == "embedding" else moment_of(32),
            row_weight=p / p.sum() if kind in ("embedding", "tied") else None,
        ),
    )
    recipe = Recipe(structure, storage)
    made = recipe.make(site)
    assert recipe.stored_bytes(site) == sum(t.numel() * t.element_size() for t in made.tensors.values())
    made.apply(gm, site)
    finish(gm)
    with torch.no_grad():
        net.weight.copy_(made.weight.reshape(net.weight.shape))
        torch.testing.assert_close(gm(x), net(x), rtol=1e-5, atol=1e-5)  # the very same product
    assert "unmask" in gm.code


@each
def test_what_is_kept_of_each_row_trains_and_the_rest_stays_zero(structure):
    gm = capture(Net("linear"), (INPUTS["linear"],))
    (site,) = find_sites(gm)
    made = Recipe(structure).make(site)
    made.apply(gm, site)
    finish(gm)
    values = gm.get_parameter("values").requires_grad_()
    gm(INPUTS["linear"]).square().sum().backward()
    assert bool(values.grad.abs().sum(0).all())
    with torch.no_grad():
        values -= 0.1 * values.grad
    dense = structure.dense({**made.tensors, "values": values}, site)
    assert bool((dense[made.weight == 0] == 0).all())


def test_bytes_shrink_as_the_tables_of_the_docstrings_say():
    site = site_of(weight_of((64, 32)))
    stored = {str(r): Recipe(r).stored_bytes(site) for r in (Prune(0.5), Prune24(), PruneBlocks(0.5, 4))}
    dense = 64 * 32 * 4
    assert stored == {
        "prune{sparsity=0.5}": dense // 2 + 64 * 32 // 8,
        "prune_2_4": dense // 2 + 64 * 32 * 3 // 4 // 8,
        "prune_blocks{sparsity=0.5, block=4}": dense // 2 + 16,  # a byte holds the 8 tiles of a row
    }


@each
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_specs_read_back(structure, storage):
    recipe = Recipe(structure, storage)
    assert parse(str(recipe), KNOWN) == recipe


def test_words_in_a_spec_need_no_quotes():
    names = {r.name: r for r in KNOWN}
    assert parse_spec("prune{sparsity=0.5, by=wanda}", names) == Prune(0.5, "wanda")
    assert parse_spec("prune_2_4{by=magnitude}", names) == Prune24("magnitude")
    assert str(Prune24()) == "prune_2_4"


@pytest.mark.parametrize("kind", ["normal", "two values", "a tenth zero", "a third zero"])
def test_what_more_of_a_row_loses_is_told_from_a_quarter(kind):
    weight = weight_of((64, 48))
    if kind == "two values":
        weight = weight.sign()
    elif kind != "normal":
        weight = weight * (torch.arange(48) % {"a tenth zero": 10, "a third zero": 3}[kind] > 0)
    site = site_of(weight, second_moment=moment_of(48))
    for structure in (Prune(3 / 8), Prune(1 / 2), Prune(3 / 4), Prune24(), PruneBlocks(1 / 2, 4)):
        bound, *_, error = structure.rising_errors(site)
        assert 0.0 < bound <= error * (1 + 1e-6) or kind == "a third zero"  # what a quarter loses tells nothing there
        assert bound <= local_error(site, structure.unstored(site)) * (1 + 1e-6)


@pytest.mark.parametrize("structure", [Prune(1 / 4), Prune(1 / 2, "wanda"), Prune24("magnitude")], ids=str)
def test_nothing_is_told_of_the_quarter_itself_or_of_other_criteria(structure):
    site = site_of(weight_of((64, 48)), second_moment=moment_of(48))
    bounds = [*structure.rising_errors(site)]
    assert bounds[0] == 0.0
    assert bounds == sorted(bounds)


def _vit(data):
    return data(vit_mnist.model), vit_mnist.normalise(data(mnist)[0])[:128].split(32)


def _stories(data):
    return data(stories.model), [{"input_ids": ids} for ids in data(lambda: stories.batches(tinystories()))[:4]]


def _grokked(data):
    return data(grokking.model), grokking.all_sums()[0][::31].split(64)


@pytest.mark.parametrize("trained", [_vit, _stories, _grokked])
def test_what_is_told_of_trained_weights_is_below_what_they_lose_and_not_far(trained, data):
    """Inputs that go with weights they were trained with are the ones that might break the rule."""
    model, batches = trained(data)
    gm, known = api.observe(model, None, list(batches), False)
    sites = [known.informed(s) for s in find_sites(gm) if s.kind == "linear" and s.columns % 4 == 0]
    assert len(sites) > 4
    for site in sites:
        for structure, share in ((Prune(1 / 2), 0.15), (Prune(3 / 4), 0.05), (Prune24(), 0.1)):
            bound, *_, error = structure.rising_errors(site)
            assert share * error < bound <= error * (1 + 1e-6), (site.name, str(structure))


@pytest.mark.parametrize("structure", [Prune(1 / 2), Prune24(), PruneBlocks(1 / 2, 4)], ids=str)
def test_some_rows_are_what_they_are_of_all(structure):
    p = torch.arange(64, 0, -1, dtype=torch.float64)
    site = site_of(weight_of((64, 48)), "embedding", row_weight=p / p.sum(), column_metric=moment_of(48))
    rows = torch.tensor([40, 3, 41, 63])
    torch.testing.assert_close(structure.unstored_rows(site, rows), structure.unstored(site)[rows], rtol=0, atol=1e-4)


@each
def test_the_space_is_sorted_and_its_bound_low(structure):
    site = site_of(weight_of((64, 32)), second_moment=moment_of(32))
    space = list(type(structure).space(site))
    stored = [Recipe(s).stored_bytes(site) for s in space]
    assert stored == sorted(stored)
    assert stored[-1] < site.dense_bytes
    errors = [local_error(site, s.unstored(site)) for s in space]
    assert errors == sorted(errors, reverse=True)
    assert all(s.error_bound(site) <= e * (1 + 1e-5) for s, e in zip(space, errors))


def test_a_sparse_weight_is_offered_its_own_sparsity_at_no_loss():
    weight = weight_of((64, 48))
    weight[:, 5:25] = 0
    site = site_of(weight, second_moment=moment_of(48))
    lossless = [p for p in Prune.space(site) if local_error(site, p.unstored(site)) < 1e-12]
    assert min(p.kept(site) for p in lossless) == 28
    tiles = weight_of((64, 48))
    tiles.view(4, 16, 3, 16)[:, :, 1] = 0
    site = site_of(tiles, second_moment=moment_of(48))
    assert [p.kept(site) for p in PruneBlocks.space(site) if local_error(site, p.unstored(site)) < 1e-12] == [2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Prune(0.0), "prune sparsity=0.0 must be the share of weights to drop, between 0 and 1"),
        (lambda: Prune(1.0), "prune sparsity=1.0 must be the share"),
        (lambda: Prune("half"), "prune sparsity='half' must be the share"),
        (lambda: Prune(0.5, "luck"), "prune by=luck: allowed are magnitude, wanda, sparsegpt"),
        (lambda: Prune24("luck"), "prune_2_4 by=luck: allowed are magnitude, wanda, sparsegpt"),
        (lambda: PruneBlocks(0.5, 1), "prune_blocks block=1 must be a whole number of at least 2"),
        (lambda: PruneBlocks(2), "prune_blocks sparsity=2 must be the share"),
        (lambda: parse("prune", KNOWN), "'prune': missing 1 required positional argument: 'sparsity'"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(make, message):
    with pytest.raises(SpecError, match=message):
        make()


@pytest.mark.parametrize(
    ("structure", "shape", "message"),
    [
        (Prune24(), (24, 30), r"prune_2_4 at weight: the weight is 24 x 30, and columns must be a multiple of 4"),
        (
            PruneBlocks(0.5),
            (24, 36),
            r"prune_blocks\{sparsity=0.5\} at weight: the weight is 24 x 36, and block must divide both sizes: "
            r"allowed are 2, 3, 4, 6, 12",
        ),
        (PruneBlocks(0.5, 2), (7, 9), r"block must divide both sizes: allowed are none"),
        (
            PruneBlocks(0.1, 4),
            (24, 16),
            r"the weight is 24 x 16, so sparsity must drop 1 to 3 of the 4 tiles of a row, not 0",
        ),
        (
            Prune(0.99),
            (24, 30),
            r"prune\{sparsity=0.99\} at weight: the weight is 24 x 30, so sparsity must drop 1 to 29 of the 30 weights "
            r"of a row, not 30",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_site(structure, shape, message):
    with pytest.raises(SpecError, match=message):
        Recipe(structure).make(site_of(weight_of(shape)))


@pytest.mark.parametrize(
    ("rewrite", "shape", "reason"),
    [
        (Prune, (8, 1), "a row of 1 weight has nothing to drop"),
        (Prune24, (8, 30), "a row of 30 weights does not divide into groups of 4"),
        (PruneBlocks, (7, 9), "a 7 x 9 weight does not divide into square tiles, several a row"),
        (PruneBlocks, (16, 2), "a 16 x 2 weight does not divide into square tiles, several a row"),
        (PruneBlocks, (6, 384), None),
        (Prune24, (1, 4), None),
    ],
)
def test_refusals(rewrite, shape, reason):
    assert rewrite.refuses(site_of(torch.ones(shape))) == reason


def test_tiles_are_weighed_unasked_only_where_some_are_zero():
    weight = weight_of((64, 48))
    budget = Budget(size="4x")
    assert PruneBlocks.unasked(site_of(weight), budget) == (
        "none of its tiles is zero, and trained weights hardly spare whole tiles; it is offered by name"
    )
    weight[16:32, 32:] = 0
    assert PruneBlocks.unasked(site_of(weight), budget) is None


def test_on_minilm_sparsegpt_beats_wanda_beats_magnitude(data):
    """Held-out error at every linear weight of the encoder, at 2:4 and at half of each row."""
    table = data(pruning_minilm.errors)
    for structure in ("prune_2_4", "prune{sparsity=0.5}"):
        by = {criterion: table[structure, criterion] for criterion in ("magnitude", "wanda", "sparsegpt")}
        assert len(by["wanda"]) == 36
        for better, worse in (("sparsegpt", "wanda"), ("wanda", "magnitude")):
            wins = sum(by[better][name] < by[worse][name] for name in by[better])
            assert wins == len(by[better]), f"{structure}: {better} beats {worse} at {wins} of 36 weights"
