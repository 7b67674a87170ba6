"""The start a Linformer gets from data: least squares, segments or strides, a random draw; what it costs."""

import math

import pytest
import sympy
import torch

from benchmarks.models import data as readers
from benchmarks.models import minilm
from fxcompress.codegen.ops import linformer_attention as op
from fxcompress.core.attention import AttentionSample, find_attention_sites, observe_attention
from fxcompress.core.calibrate import bind_batch
from fxcompress.core.capture import capture
from fxcompress.passes.linformer import E_NAME, F_NAME, Linformer, attention_error, fitted, segments, strided
from tests.attending import EPS, exact
from tests.test_capture import captured


def test_the_fitted_f_is_the_least_squares_answer():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 4, generator=generator, dtype=torch.float64) for n in (12, 6, 6))
    mask = torch.tensor([[[True] * 6], [[True] * 5 + [False]]])
    samples = [AttentionSample(q, k, v, mask, None)]
    e = segments(2, 6).double()
    e_real, _, share = op.normalised(e, e, 6, mask)
    p = torch.softmax(q @ op.project(e_real, k).mT / 2 + share.log().unsqueeze(-2), -1) / share.unsqueeze(-2)
    # y = P F (w V) is linear in F: one column of the system for each of its 2 x 6 entries.
    wv = v * mask.double().unsqueeze(-1)
    system = torch.stack([(p[..., i : i + 1] * wv[..., j : j + 1, :]).flatten() for i in range(2) for j in range(6)], 1)
    target = exact(q, k, v, mask.unsqueeze(-2)).flatten()
    best = torch.linalg.lstsq(system, target.unsqueeze(1)).solution.reshape(2, 6)
    lowest = float((system @ best.flatten() - target).square().sum() / target.square().sum())
    got = fitted(e, samples, samples)
    # 12 unknowns and 16 steps: conjugate gradients are at the answer up to rounding.
    assert got.error == pytest.approx(lowest, rel=1e-9)
    assert attention_error(samples, got.e, got.f) == pytest.approx(lowest, rel=1e-9)
    assert got.error < 0.9 * attention_error(samples, e, e)


def test_data_decides_between_segments_and_strides():
    site = find_attention_sites(captured("bert")[1])[0]
    generator = torch.Generator().manual_seed(0)
    short = [AttentionSample(*(torch.randn(4, 4, 8, 8, generator=generator) for _ in range(3)), None, None)]
    made = Linformer(8).factor(site, short)
    assert torch.equal(made[E_NAME], strided(8, 64))  # exact up to 8 keys
    assert attention_error(short, made[E_NAME], made[F_NAME]) < 1e-10
    walk = torch.randn(8, 4, 64, 8, generator=generator).cumsum(-2) / 8  # neighbours are alike
    made = Linformer(8).factor(site, [AttentionSample(walk, walk, walk, None, None)])
    assert torch.equal(made[E_NAME], segments(8, 64))
    alone = Linformer(8).factor(site)
    assert torch.equal(alone[E_NAME], segments(8, 64))
    assert torch.equal(alone[F_NAME], segments(8, 64))


def test_a_full_length_stays_the_identity_whatever_the_data():
    site = find_attention_sites(captured("bert")[1])[0]
    generator = torch.Generator().manual_seed(0)
    sample = AttentionSample(*(torch.randn(4, 4, 64, 8, generator=generator) for _ in range(3)), None, None)
    made = Linformer(64).factor(site, [sample])
    assert attention_error([sample], made[E_NAME], made[F_NAME]) < (100 * EPS) ** 2


def test_a_draw_is_the_random_projection_of_the_paper():
    site = find_attention_sites(captured("bert")[1])[0]
    e, f = Linformer(16).draw(site, torch.Generator().manual_seed(0)).values()
    again, _ = Linformer(16).draw(site, torch.Generator().manual_seed(0)).values()
    assert e.shape == f.shape == (16, 64)
    assert torch.equal(e, again)
    assert not torch.equal(e, f)
    # 1024 entries: the variance is off by sqrt(2 / 1024) of itself, four of those.
    assert float(e.square().mean()) == pytest.approx(1 / 16, rel=4 * math.sqrt(2 / 1024))


def test_the_cost_grows_with_the_sequence_and_not_with_its_square():
    site = find_attention_sites(captured("bert")[1])[0]
    cost = Linformer(16).cost(site)
    batch, n = site.batch, site.size("k", -2)
    assert sympy.simplify(cost.flops - 2 * batch * 4 * 2 * n * 16 * 16) == 0
    assert cost.weight_bytes == 2 * 16 * 64 * 4
    made = Linformer(16).factor(site)
    assert sum(t.numel() * t.element_size() for t in made.values()) == cost.weight_bytes


def test_only_real_text_is_measured_and_padding_is_not():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 8, 4, generator=generator) for _ in range(3))
    mask = (torch.arange(8) < 5).expand(2, 1, 8)
    e = segments(3, 8)
    padded = attention_error([AttentionSample(q, k, v, mask, None)], e, e)
    alone = attention_error([AttentionSample(q[:, :, :5], k[:, :, :5], v[:, :, :5], None, None)], e, e)
    assert padded == pytest.approx(alone, rel=1e-5)  # float32 sums in another order


@pytest.fixture(scope="module")
def joined():
    """Sixteen sentences to a sequence: 256 tokens each, no padding."""

    def make(first, last):
        sentences = [text for text, _ in readers.sst2("train")]
        return minilm.batches([" ".join(sentences[i * 16 : i * 16 + 16]) for i in range(first, last)], 8, 256)

    return make


def test_on_minilm_the_calibrated_start_beats_segments_strides_and_chance(data, joined):
    model = data(minilm.model)
    calibration, fresh = data(joined, 0, 16), joined(100, 108)
    gm = capture(model, calibration[0])
    sites = find_attention_sites(gm)
    assert [s.max_keys for s in sites] == [512] * 6
    site, spec = sites[3], Linformer(128, 256)
    sample = observe_attention(gm, site, [bind_batch(gm, b, 0) for b in calibration])
    test = observe_attention(gm, site, [bind_batch(gm, b, 0) for b in fresh])
    made, drawn = spec.factor(site, sample), spec.draw(site, torch.Generator().manual_seed(0))
    starts = {"segments": (segments(128, 256),) * 2, "strided": (strided(128, 256),) * 2}
    starts |= {"calibrated": tuple(made.values()), "random": tuple(drawn.values())}
    errors = {name: attention_error(test, *pair) for name, pair in starts.items()}
    assert errors["calibrated"] < 0.8 * errors["segments"]
    assert errors["segments"] < errors["strided"] < errors["random"]
