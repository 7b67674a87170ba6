"""How often the rows of a table will be read: sums, the unseen, and what Good and Turing say of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxcompress.core.calibrate import row_probabilities


@given(st.lists(st.integers(0, 50), min_size=1, max_size=400))
def test_row_probabilities_sum_to_one_and_leave_no_row_out(counts):
    p = row_probabilities(torch.tensor(counts, dtype=torch.float64))
    # Sums of at most 400 numbers in float64.
    assert float(p.sum()) == pytest.approx(1.0, abs=400 * 2**-52)
    assert bool((p >= 0.1 / len(counts) * (1 - 1e-12)).all())


def test_unseen_rows_get_more_mass_where_more_rows_were_seen_once():
    counts = torch.zeros(256, dtype=torch.float64)
    counts[:64] = 40  # frequent
    counts[64:128:2] = 1  # a stretch of rare ones, half of them not seen this time
    p = row_probabilities(counts)
    unseen_among_rare, unseen_among_absent = p[65:128:2].mean(), p[128:].mean()
    assert float(unseen_among_rare) > 2 * float(unseen_among_absent)
    assert float(p[:64].min()) > float(unseen_among_rare)


def test_the_mass_of_unseen_rows_is_what_good_and_turing_say():
    torch.manual_seed(0)
    true = 1 / torch.arange(1, 3001, dtype=torch.float64)
    true /= true.sum()
    counts = torch.bincount(torch.multinomial(true, 5000, replacement=True), minlength=3000).double()
    p = row_probabilities(counts)
    unseen = counts == 0
    # Good-Turing: unseen mass is about N_1 / N. The estimate hedges upwards by design: by 1.5, and a tenth is even.
    turing = float((counts == 1).sum() / counts.sum())
    assert turing == pytest.approx(float(true[unseen].sum()), rel=0.25)
    assert 0.5 * turing < float(p[unseen].sum()) < 3 * turing
    log_loss = float(-(true * p.log()).sum())
    assert log_loss < float(-(true * torch.full_like(true, 1 / 3000).log()).sum())


def test_no_counts_mean_every_row_alike():
    assert torch.equal(
        row_probabilities(torch.zeros(5, dtype=torch.float64)), torch.full((5,), 0.2, dtype=torch.float64)
    )
