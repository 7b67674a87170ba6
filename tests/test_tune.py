"""Tuning with a timer made up: which kernels, which configs, what is kept; and the table that is only predicted."""

import json

import pytest
import torch
from torch import nn

triton = pytest.importorskip("triton", reason="triton is not installed")

import fxcompress  # noqa: E402
from fxcompress.cli import main  # noqa: E402
from fxcompress.codegen.spec import parse  # noqa: E402
from fxcompress.codegen.triton import catalogue, configs, launch, seed, tune  # noqa: E402
from fxcompress.codegen.triton.card import H200  # noqa: E402
from fxcompress.codegen.triton.generate import generate  # noqa: E402
from fxcompress.codegen.triton.interpreter import interpreter  # noqa: E402
from fxcompress.codegen.triton.kernel import Config  # noqa: E402
from fxcompress.codegen.triton.timing import Timing  # noqa: E402
from tests.test_kernels import quantized  # noqa: E402

INT4, TENSORS = quantized(64, 256, torch.bfloat16)
LINEAR = f"linear(x, {INT4})"
LOW_RANK = "low_rank_linear(x, bfloat16[16, 64], bfloat16[48, 16])"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(configs, "_SHIPPED", tmp_path / "nothing is shipped")
    configs._table.cache_clear()
    yield
    configs._table.cache_clear()


def work(text, tensors):
    return tune.Work(generate(parse(text), torch.bfloat16), tuple(tensors))


def factors():
    return [torch.randn(16, 64).bfloat16(), torch.randn(48, 16).bfloat16()]


class Stopwatch:
    """Seconds of each call by the config it launches; `usual` of all others."""

    def __init__(self, monkeypatch, times, usual=10e-6, spread=0.01):
        self.times, self.usual, self.spread, self.used = times, usual, spread, []
        for name in ("__call__", "apart"):
            monkeypatch.setattr(tune.Kernel, name, self.note(name))
            for kind in {type(generate(parse(text), torch.bfloat16)) for text in (LINEAR, LOW_RANK)}:
                if name in vars(kind):
                    monkeypatch.setattr(kind, name, self.note(name))

    def note(self, name):
        def run(kernel, x, prepared, *others):
            self.used.append(others[1] if name == "__call__" else None)

        return run

    def __call__(self, calls):
        for call in calls:
            call()
        return Timing(self.times.get(self.used[-1], self.usual), self.spread, True)


def best(monkeypatch, times, tokens=(1, 16), **how):
    watch = Stopwatch(monkeypatch, times, **how)
    (found,) = tune.tune([work(LINEAR, TENSORS)], tokens, H200, 0, watch)
    return found, watch


RULE = generate(parse(LINEAR), torch.bfloat16).rule(16, H200.multiprocessors)
NEAR = Config(RULE.block_m, RULE.block_n, RULE.split, RULE.warps, 4)


def test_the_fastest_is_kept_with_its_time_and_the_rules(monkeypatch):
    found, watch = best(monkeypatch, {NEAR: 8e-6})
    assert (found.config, found.bucket) == (NEAR, 16)
    assert (found.took, found.instead_of) == (pytest.approx(16e-6), pytest.approx(20e-6))  # at 1 and at 16 tokens
    assert {RULE, None, NEAR} <= set(watch.used)
    assert len(set(watch.used)) <= tune.MOST + 1


def test_what_is_faster_by_no_more_than_the_noise_changes_nothing(monkeypatch):
    assert best(monkeypatch, {NEAR: 9.81e-6})[0].config == RULE
    assert best(monkeypatch, {NEAR: 9.79e-6})[0].config == NEAR
    assert best(monkeypatch, {NEAR: 8e-6}, spread=0.2)[0].config == RULE


def test_no_config_is_an_answer_too(monkeypatch):
    assert best(monkeypatch, {None: 5e-6}, tokens=(1024,))[0].config is None


def test_what_the_compiler_refuses_is_left_out(monkeypatch):
    from triton.runtime.errors import OutOfResources

    class Picky(Stopwatch):
        def __call__(self, calls):
            timing = super().__call__(calls)
            if self.used[-1] in (RULE, NEAR):
                raise OutOfResources(300_000, 232_448, "shared memory")
            return timing

    (found,) = tune.tune([work(LINEAR, TENSORS)], [16], H200, 0, Picky(monkeypatch, {NEAR: 1e-6, None: 9e-6}))
    assert found.config is None


@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.name) for entry in catalogue.ENTRIES])
@pytest.mark.parametrize("tokens", [1, 64, 1024])
def test_candidates_are_near_the_rule_few_and_all_different(entry, tokens):
    kernel = generate(parse(entry.product), torch.bfloat16)
    found = tune.candidates(kernel, tokens, 132)
    rule = kernel.rule(tokens, 132)
    assert rule is None or found[0] == rule
    assert len(set(found)) == len(found) <= tune.MOST
    assert all(config.block_m <= max(16, tokens) for config in found[1:])


def test_a_kernel_that_can_be_put_together_from_others_comes_behind_them():
    with interpreter():
        kinds = [each.key for each in tune.with_parts([work(LOW_RANK, factors()), work(LINEAR, TENSORS)])]
    assert [key[0].split("[")[0] for key in kinds] == ["linear", "linear", "low_rank_linear", "linear"]
    assert [key[1] for key in kinds] == ["16x64", "48x16", "48x64", "64x256"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    inputs = torch.randn(32, 64)
    compiled = fxcompress.compile(Net(), "3x", calibration=inputs.split(8), rewrites=["quantize"], progress=False)
    folder = tmp_path_factory.mktemp("models") / "small"
    fxcompress.save(compiled, folder)
    return folder


def test_every_kernel_of_a_loaded_model_is_found(saved):
    works = tune.works_of(fxcompress.load(saved))
    assert sorted(w.key[1] for w in works) == ["128x64", "64x128"]
    assert all(w.key[0].endswith(" float32") for w in works)
    down = next(w for w in works if w.kernel.rows == 64)
    assert [o.kind for o in down.kernel.epilogue.operands if o.name.startswith("e")] == ["full"]  # the residual


def test_a_model_is_tuned_and_its_kernels_find_what_was_kept(saved):
    def fake(calls):
        calls[0]()
        return Timing(1e-6, 0.0, True)

    model = fxcompress.load(saved)
    with interpreter():
        found = tune.tune_model(model, [1], H200, 0, fake, progress=False)
    assert len(found) == 2
    told = json.loads(configs.own_table(H200.name).read_text())
    assert (told["device"], told["source"], told["torch"]) == (H200.name, "fxcompress tune", torch.__version__)
    for work in tune.works_of(model):
        assert told["configs"][work.key[0]][work.key[1]].keys() == {"16"}
        assert configs.choose(work.kernel, 5, H200) == next(f.config for f in found if f.key == work.key)
    assert "us by rule" in tune.table(found)


def test_a_seeded_size_amends_the_rule_and_a_measured_one_comes_first():
    kernel, rule = generate(parse(LINEAR), torch.bfloat16), RULE
    seeded = Config(99, rule.block_n // 2, 99, 8, 5)
    configs.remember(H200.name, kernel.label, configs.ANY, {16: seeded}, {})
    found = configs.choose(kernel, 3, H200)
    assert found == Config(rule.block_m, rule.block_n // 2, max(1, rule.split // 2), 8, 5)
    assert configs.choose(kernel, 2000, H200) is None
    configs.remember(H200.name, kernel.label, "64x256", {16: NEAR}, {})
    assert configs.choose(kernel, 3, H200) == NEAR


def test_shipped_tables_are_predictions_and_say_so(monkeypatch):
    monkeypatch.undo()
    for card in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"):
        path = configs._SHIPPED / f"{configs._file(card)}.json"
        told = configs._read(path)
        assert "nothing was measured" in told["source"]
        assert told["configs"]
        assert "date" not in told  # of no measurement
        assert all(list(sizes) == [configs.ANY] for sizes in told["configs"].values())


def test_a_seed_keeps_the_rule_unless_the_model_sees_more(monkeypatch):
    entry = next(e for e in catalogue.ENTRIES if e.name == "int4 g128")
    rule = generate(parse(entry.product), torch.bfloat16).rule(16, 132)
    near = Config(rule.block_m, rule.block_n, rule.split, 8, rule.stages)
    for score, kept in ((0.94, rule), (0.96, near)):
        scores = {rule: 0.9, near: score}
        monkeypatch.setattr(seed, "_score", lambda kernel, entry, config, *_, known=scores: known.get(config, 0.0))
        first, _ = seed.seeds(90, [entry])
        assert (first.rule, first.config) == (rule, kept)
    told = seed.table([first], 90, "3.6.0")
    assert told["configs"]["linear[int4 g128] bfloat16"]["*"]["16"]["warps"] == 8
    assert told["source"].startswith("static model of sm_90, triton 3.6.0")


def test_a_score_is_of_the_machine_code():
    entry = next(e for e in catalogue.ENTRIES if e.name == "dense")
    kernel = generate(parse(entry.product), torch.bfloat16)
    good, poor = (
        seed._score(kernel, entry, config, 16, 90, seed.H200)
        for config in (Config(16, 128, 4, 4, 4), Config(16, 32, 1, 4, 2))
    )
    assert 0 < poor < good <= 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["tune"], "tune takes either the folder of a compressed model, or --seed."),
        (["tune", "{saved}", "--seed"], "tune takes either the folder of a compressed model, or --seed."),
        (["tune", "{saved}", "--tokens", "0"], "--tokens 0: numbers of tokens are 1 or more."),
        (["tune", "{saved}"], "tuning needs a CUDA GPU, and torch"),
        (["tune", "--seed", "--arch", "70"], "--arch 70: kernels can be compiled for 80"),
    ],
)
def test_what_cannot_be_tuned_is_said(arguments, complaint, saved, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([a.format(saved=saved) for a in arguments]) == 1
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert printed.out == ""


def test_the_command_prints_a_seeded_table(capsys, monkeypatch):
    monkeypatch.setattr(catalogue, "ENTRIES", catalogue.ENTRIES[:1])
    for better, named in ((3, []), (8, ["linear[bfloat16] bfloat16"])):
        monkeypatch.setattr(seed, "_score", lambda *of, best=better: float(of[2].warps == best))
        assert main(["tune", "--seed", "--quiet"]) == 0
        assert list(json.loads(capsys.readouterr().out)["configs"]) == named


def test_nothing_here_asked_the_driver():
    assert not torch.cuda.is_initialized()
    assert launch._failures()
