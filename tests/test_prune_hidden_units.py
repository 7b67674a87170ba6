"""Hidden units cut out of whole models: planted dead units, smaller graphs, bytes, training, checkpoints."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxcompress
from benchmarks.models import data as readers
from benchmarks.models import minilm
from fxcompress.core.calibrate import calibrate
from fxcompress.core.capture import capture
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import corrected_bias, local_error
from fxcompress.core.site import attribute, find_sites
from fxcompress.core.surgery import attribute_of, finish, own_tensors, stored_bytes
from fxcompress.passes.dependency import find_groups
from fxcompress.passes.hidden_units import refit
from fxcompress.passes.prune_hidden_units import prune_hidden_units, remove
from tests.hidden import MODEL_IDS, MODELS, batches, bert, captured, distance, gpt2, llama, outputs


def plant(model):
    """Twelve neurons of each layer, and two heads of each attention, that can go at no loss."""
    with torch.no_grad():
        for layer in model.encoder.layer:
            up, down = layer.intermediate.dense, layer.output.dense
            down.weight[:, :4] = 0  # nobody reads them
            up.weight[4:8], up.bias[4:8] = 0, -40  # gelu makes them zero for every input
            up.weight[8:12], up.bias[8:12] = up.weight[20:24], up.bias[20:24]  # four are there twice
            attention, out = layer.attention.self, layer.attention.output.dense
            for part in (attention.query, attention.key, attention.value):
                part.weight[8:16], part.bias[8:16] = part.weight[:8], part.bias[:8]
            out.weight[:, 16:24] = 0
    return model


def test_units_that_do_nothing_or_exist_twice_are_cut_at_no_loss():
    model = plant(bert())
    gm, known = captured(model)
    pruned = prune_hidden_units(gm, known, {"*.intermediate.dense": 36, "*.self.query": 2})
    for i in range(2):
        kept = pruned.get_parameter(f"encoder.layer.{i}.intermediate.dense.bias")
        assert kept.shape == (36,)
        assert float(kept.detach().min()) > -10
        assert pruned.get_parameter(f"encoder.layer.{i}.attention.output.dense.weight").shape == (32, 16)
    # The refit is damped by 1e-6 of the mean moment, the metric lifted by CENTRED_FLOOR = 1e-6 more, and doubled units
    # keep that share of their output (more where their moment is below the mean); float32 rounds at 1e-7.
    for batch in batches(2, length=9):
        assert distance(pruned, model, batch) < 3e-5


@pytest.mark.parametrize("make", MODELS, ids=MODEL_IDS)
def test_the_smaller_graph_is_the_whole_one_with_nothing_read_of_what_is_gone(make):
    gm, known = captured(make())
    pruned = prune_hidden_units(gm, known, 0.5)
    whole = gm.copy()
    own_tensors(whole)
    sites = {site.name: site for site in find_sites(whole)}
    for group in find_groups(gm)[0]:
        (site,) = (known.informed(sites[name]) for name in group.consumers)
        weight = remove([site], group, group.units // 2).weights[site.name]
        bias = site.uses[0].bias
        if bias is not None:
            attribute(whole, str(bias.target)).copy_(corrected_bias(site, weight, attribute_of(bias)))
        site.weight.copy_(weight)
    for batch in (batches(1)[0], batches(1, length=7)[0]):
        # the same products, summed in another order: 2^-24 a step, through two layers that multiply it by 10 or so
        assert distance(pruned, whole, batch) < 1e-5
        assert distance(pruned, gm, batch) > 1e-3  # so it was no empty comparison


@pytest.mark.parametrize("make", MODELS, ids=MODEL_IDS)
def test_shapes_in_the_graph_are_those_of_its_values(make):
    gm, known = captured(make())
    pruned = prune_hidden_units(gm, known, 0.5)
    claimed = {}

    class Shapes(fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            pairs = zip(pytree.tree_leaves(n.meta.get("val")), pytree.tree_leaves(value))
            for said, real in pairs if n.op != "output" else ():
                if isinstance(said, Tensor):
                    claimed[n.name] = [(a, b) for a, b in zip(said.shape, real.shape, strict=True) if type(a) is int]
            return value

    args, kwargs = pruned.signature.bind((), batches(1)[0])
    Shapes(pruned).run(*pytree.tree_leaves((args, kwargs)), enable_io_processing=False)
    assert len(claimed) > 50
    assert {name: pairs for name, pairs in claimed.items() if any(a != b for a, b in pairs)} == {}


@pytest.mark.parametrize("make", MODELS, ids=MODEL_IDS)
def test_bytes_fall_by_the_units_cut_and_the_original_stays(make):
    gm, known = captured(make())
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    text = str(gm.graph)
    pruned = prune_hidden_units(gm, known, 0.5)
    saved = sum(
        cut.span.size // cut.span.units * (group.units - group.units // 2) * size // cut.span.size
        for group in find_groups(gm)[0]
        for cut in group.stored
        for size in [4 * attribute(gm, cut.holder).numel()]
    )
    whole = gm.copy()
    finish(whole)  # drops what the graph never read
    assert stored_bytes(whole) - stored_bytes(pruned) == saved
    assert str(gm.graph) == text
    assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())
    mine, theirs = ({t.data_ptr() for t in module.parameters()} for module in (pruned, gm))
    assert not mine & theirs


@pytest.mark.parametrize("make", MODELS, ids=MODEL_IDS)
def test_a_smaller_model_is_saved_and_loaded_bit_for_bit(make, tmp_path):
    gm, known = captured(make())
    pruned = prune_hidden_units(gm, known, 0.5)
    fxcompress.save(fxcompress.compile(pruned, "100%", example_inputs=batches(1)[0], progress=False), tmp_path / "m")
    loaded = fxcompress.load(tmp_path / "m")
    for batch in (batches(1)[0], batches(1, length=7)[0]):
        for a, b in zip(outputs(pruned, batch), outputs(loaded, batch), strict=True):
            assert torch.equal(a, b)


def test_it_trains_where_the_original_did():
    model = gpt2()
    model.transformer.wpe.weight.requires_grad_(False)
    gm, known = captured(model)
    pruned = prune_hidden_units(gm, known, 0.5)
    trained = {name for name, p in pruned.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in pruned.named_parameters()} - {"transformer.wpe.weight"}
    logits = pruned(**batches(1)[0]).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), batches(1)[0]["input_ids"][:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in pruned.named_parameters() if p.requires_grad}
    assert all(g is not None and float(g.norm()) > 0 for g in gradients.values())


def values_at(gm, name, calls):
    """What one node gives over some calls, end to end."""
    found = []

    class At(fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n.name == name:
                found.append(value)
            return value

    with torch.no_grad():
        for call in calls:
            At(gm).run(*pytree.tree_leaves(call), enable_io_processing=False)
    return torch.cat([value.flatten() for value in found])


@pytest.mark.parametrize(
    ("make", "pattern"),
    [(bert, "encoder.layer.0.intermediate.dense"), (bert, "encoder.layer.0.attention.self.key"),
     (gpt2, "transformer.h.0.attn.c_attn"), (functools.partial(llama, 2), "model.layers.0.mlp.up_proj")],
    ids=["neurons", "heads", "fused heads", "gated"],
)  # fmt: skip
def test_the_predicted_error_is_the_measured_one(make, pattern):
    gm, known = captured(make())
    group = next(g for g in find_groups(gm)[0] if pattern in g.sites)
    sites = {site.name: site for site in find_sites(gm)}
    removal = remove([known.informed(sites[group.name])], group, group.units // 2)
    pruned = prune_hidden_units(gm, known, {pattern: group.units // 2})
    node = sites[group.name].uses[0].node.name
    y, mine = (values_at(g, node, known.held_out) for g in (gm, pruned))
    shift = sites[group.name].uses[0].bias
    signal = y if shift is None else y - attribute_of(shift).repeat(len(y) // len(attribute_of(shift)))
    measured = float((y - mine).norm() / signal.norm())  # errors are relative to x W^T, the bias left out
    # moments are summed in float32 and the products of `local_error` made in it: a part in 10^5 of a squared error
    # that is not small itself
    assert measured == pytest.approx(removal.errors[group.name], rel=1e-3)
    assert measured > 0.01


def test_a_chain_is_cut_on_both_sides_of_its_middle():
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    data = [torch.randn(64, 6) for _ in range(4)]
    gm = capture(chain, (data[0],))
    known = calibrate(gm, find_sites(gm), data, progress=False)
    pruned = prune_hidden_units(gm, known, {"0": 10, "4": 0.75})
    assert {n: tuple(p.shape) for n, p in pruned.named_parameters() if n.endswith("weight")} == {
        "0.weight": (10, 6), "2.weight": (9, 10), "4.weight": (3, 9)
    }  # fmt: skip
    sites = {s.name: known.informed(s) for s in find_sites(gm)}
    first, second = (remove([sites[g.name]], g, k) for g, k in zip(find_groups(gm)[0], (10, 9)))
    weight = first.weights["2"]
    x = data[1]
    with torch.no_grad():
        h = F.linear(chain[0](x).relu(), weight, corrected_bias(sites["2"], weight, chain[2].bias)).relu()
        h[:, [i for i in range(12) if i not in second.kept.tolist()]] = 7.0  # whatever it is, nobody reads it
        bias = corrected_bias(sites["4"], second.weights["4"], chain[4].bias)
        y = F.linear(h, second.weights["4"], bias)
    assert torch.allclose(pruned(x), y, rtol=0, atol=1e-5)


def test_a_parameter_between_the_linears_is_cut_too():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
            self.scale = nn.Parameter(torch.rand(8))

        def forward(self, x):
            return self.down(self.up(x).relu() * self.scale)

    torch.manual_seed(0)
    data = [torch.randn(32, 6) for _ in range(4)]
    gm = capture(Scaled(), (data[0],))
    pruned = prune_hidden_units(gm, calibrate(gm, find_sites(gm), data, progress=False), 0.5)
    assert pruned.scale.shape == (4,)
    pruned(data[0])


@pytest.mark.parametrize("parts", ["split", "sizes", "unflatten"])
def test_sizes_written_into_splits_and_views_follow(parts):
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(6, 36), nn.Linear(12, 6)

        def forward(self, x):
            h = self.qkv(x)
            if parts == "unflatten":
                q, k, v = h.unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            else:
                sizes = 12 if parts == "split" else [12, 12, 12]
                q, k, v = (p.unflatten(-1, (3, 4)).transpose(1, 2) for p in h.split(sizes, -1))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            return self.out(y.reshape(y.shape[0], y.shape[1], y.shape[2] * 4))

    torch.manual_seed(0)
    model = Fused().eval()
    with torch.no_grad():
        model.out.weight[:, 4:8] = 0  # the second head is read by nobody
    data = [torch.randn(8, 5, 6) for _ in range(4)]
    gm = capture(model, (data[0],))
    pruned = prune_hidden_units(gm, calibrate(gm, find_sites(gm), data, progress=False), {"qkv": 2})
    assert pruned.get_parameter("qkv.weight").shape == (24, 6)
    assert torch.allclose(pruned(data[1]), model(data[1]), rtol=0, atol=1e-6)  # sums of a dozen numbers below 1


def test_the_first_pattern_that_matches_wins_and_the_rest_stays():
    gm, known = captured(bert())
    keep = {"encoder.layer.1.intermediate.dense": 10, "*.intermediate.dense": 0.5, "*.1.attention.self.value": 3}
    pruned = prune_hidden_units(gm, known, keep)
    shapes = {name: tuple(p.shape) for name, p in pruned.named_parameters()}
    assert shapes["encoder.layer.0.intermediate.dense.weight"] == (24, 32)
    assert shapes["encoder.layer.1.output.dense.weight"] == (32, 10)
    assert shapes["encoder.layer.0.attention.self.query.weight"] == (32, 32)
    assert shapes["encoder.layer.1.attention.self.query.weight"] == (24, 32)


def test_more_units_than_there_are_names_the_group_and_the_range():
    gm, known = captured(bert())
    message = (
        r"hidden_units\{kept=5\} at encoder.layer.0.attention.output.dense: it reads 4 units of 8 columns, so kept "
        "must be 1 to 4."
    )
    with pytest.raises(SpecError, match=message):
        prune_hidden_units(gm, known, {"encoder.layer.0.attention.self.query": 5})


def test_a_pattern_that_names_no_group_says_what_there_is():
    gm, known = captured(bert())
    message = (
        r"'encoder.layer.7.\*' names no site of a group of hidden units; groups are "
        "encoder.layer.0.attention.output.dense, encoder.layer.0.output.dense, encoder.layer.1.attention"
    )
    with pytest.raises(SpecError, match=message):
        prune_hidden_units(gm, known, {"encoder.layer.7.*": 0.5})
    message = r"\(encoder.layer.0.attention.self.query reads units that cannot be cut: embedding \(embedding\) looks it"
    with pytest.raises(SpecError, match=message):
        prune_hidden_units(gm, known, {"pooler.dense": 0.5})


def test_a_smaller_model_compiles_on(tmp_path):
    gm, known = captured(bert())
    pruned = prune_hidden_units(gm, known, 0.5)
    compiled = fxcompress.compile(pruned, "80%", calibration=batches(), progress=False)
    assert compiled.report.measured_bytes < stored_bytes(pruned)
    assert distance(compiled, pruned, batches(1)[0]) < 0.2


def test_minilm_loses_less_than_by_magnitude_and_without_refit(data):
    model = data(minilm.model)
    gm = capture(model, minilm.batches(["a sentence"])[0])
    sites = {site.name: site for site in find_sites(gm)}
    texts = [text for text, _ in data(readers.sst2, "dev")][:128]
    known = calibrate(gm, list(sites.values()), minilm.batches(texts), progress=False)
    groups, _ = find_groups(gm)
    assert [(g.units, g.width) for g in groups] == [(12, 32), (1536, 1)] * 6
    group = groups[1]
    site = known.informed(sites[group.name])
    removal = remove([site], group, 1152)
    longest = site.weight.norm(dim=0).argsort(descending=True)[:1152]
    magnitude = torch.zeros_like(site.weight).index_copy(1, longest, site.weight[:, longest])
    refitted = refit(site, group.span_of(site), longest.sort().values)
    ours, chosen, plain = removal.errors[group.name], local_error(site, refitted) ** 0.5, local_error(site, magnitude)
    assert ours < 0.8 * chosen  # the choice
    assert chosen < 0.8 * plain**0.5  # the refit
    pruned = prune_hidden_units(gm, known, {"encoder.layer.0.intermediate.dense": 0.75})
    unread = 512 * 8  # ids of segments, of which it is given its own
    assert stored_bytes(gm) - stored_bytes(pruned) == 384 * (384 + 1 + 384) * 4 + unread
    fresh = [text for text, _ in readers.sst2("train")][:32]
    assert minilm.mean_cosine(minilm.embed(pruned, fresh), minilm.embed(model, fresh)) > 0.99
