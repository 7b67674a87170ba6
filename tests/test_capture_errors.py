"""What cannot be captured is refused with the model's own line, or the weight's own name."""

import inspect

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.core.capture import capture
from fxcompress.core.errors import CaptureError, InputError, NonFiniteError


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        y = self.linear(x)
        if y.sum() > 0:  # the offending line
            return y
        return -y


class Nonzero(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x).nonzero()  # the sizing line


def line_of(kind, marker):
    lines, start = inspect.getsourcelines(kind)
    return start + next(i for i, line in enumerate(lines) if marker in line)


def test_control_flow_is_refused_with_the_file_and_line_of_the_model():
    line = line_of(Branches, "# the offending line")
    with pytest.raises(CaptureError, match=rf'Branches at File ".*errors\.py", line {line}: if y\.sum\(\) > 0'):
        capture(Branches(), (torch.randn(2, 8),))


def test_control_flow_inside_a_submodule_names_the_submodules_line():
    line = line_of(Branches, "# the offending line")
    with pytest.raises(CaptureError, match=rf'test_capture_errors\.py", line {line}:'):
        capture(nn.Sequential(nn.Linear(8, 8), Branches()), (torch.randn(2, 8),))


def test_an_output_whose_size_depends_on_the_data_is_refused_with_its_line():
    line = line_of(Nonzero, "# the sizing line")
    with pytest.raises(CaptureError, match=rf"output 0 of Nonzero has a size that depends on the data.*line {line}"):
        capture(Nonzero(), (torch.randn(2, 8),))


def test_example_inputs_that_do_not_fit_forward_are_input_errors():
    with pytest.raises((InputError, CaptureError), match="Linear"):
        capture(nn.Linear(8, 8), (torch.randn(2, 8), torch.randn(2, 8)))


def test_an_unknown_example_keyword_names_it():
    with pytest.raises((InputError, CaptureError), match="nonsense"):
        capture(nn.Linear(8, 8), {"input": torch.randn(2, 8), "nonsense": torch.randn(2, 8)})


def test_example_inputs_of_the_wrong_size_name_the_model():
    with pytest.raises(CaptureError, match="cannot capture Linear"):
        capture(nn.Linear(8, 8), (torch.randn(2, 9),))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(value):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    with torch.no_grad():
        model[2].weight[1, 2] = value
    with pytest.raises(NonFiniteError, match=r"weight '2\.weight' holds 1 NaN or infinite of 128 values"):
        capture(model, (torch.randn(2, 16),))


def test_a_failed_compile_leaves_the_model_as_it_was():
    model = Branches().train()
    state = torch.random.get_rng_state()
    with pytest.raises(CaptureError):
        fxcompress.compile(
            model, "2x", example_inputs=(torch.randn(2, 8, generator=torch.Generator()),), progress=False
        )
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
