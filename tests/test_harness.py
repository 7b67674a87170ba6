"""FxcompressLM in lm-evaluation-harness, on a task of this file, against sums over the model's own logits."""

from __future__ import annotations

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import fxcompress
from benchmarks.models import data as readers
from benchmarks.models import stories
from fxcompress.core.errors import EvaluationError
from tests import stories_folder

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is absent: pip install 'fxcompress[lm-eval]'")

STARTS = ["Once upon a time, there was a little", "Lily and Tom went to the park. They", "", "The dog was very"]
ENDS = [" girl named Lily", " were happy.", "Tom had a red ball.", " hungry"]


@pytest.fixture(scope="module")
def small():
    """stories260K at 4x, and its tokenizer."""
    try:
        model = stories.model()
    except readers.DataMissing as missing:
        pytest.skip(str(missing))
    example = {"input_ids": torch.zeros(2, 9, dtype=torch.long)}
    compiled = fxcompress.compile(model, "4x", rewrites=["quantize"], example_inputs=example, progress=False)
    return compiled, stories_folder.tokenizer()


def harness():
    return importlib.import_module("fxcompress.evaluation.harness")


def asked(*arguments):
    return [SimpleNamespace(args=each) for each in zip(*arguments)]


def log_p(model, ids):
    """(tokens - 1,) of each token after those before it, one call for each."""
    with torch.no_grad():
        rows = [model(torch.tensor([ids[:i]])).logits[0, -1].double().log_softmax(-1) for i in range(1, len(ids))]
    return [float(row[token]) for row, token in zip(rows, ids[1:])], [int(row.argmax()) for row in rows]


def test_log_likelihoods_are_sums_over_the_tokens(small):
    compiled, tokenizer = small
    lm = harness().FxcompressLM(compiled, tokenizer, batch_size=3)
    found = lm.loglikelihood(asked(STARTS, ENDS), disable_tqdm=True)
    for start, end, (total, greedy) in zip(STARTS, ENDS, found):
        ids = tokenizer.encode(start + end)
        begun = len(tokenizer.encode(start))
        each, best = log_p(compiled, ids)
        # float32 log probabilities of up to 10, each rounded by some 1e-6
        assert total == pytest.approx(sum(each[begun - 1 :]), abs=1e-5 * len(ids))
        assert greedy == (best[begun - 1 :] == ids[begun:])
    rolled = lm.loglikelihood_rolling(asked(STARTS[:2]), disable_tqdm=True)
    for start, total in zip(STARTS, rolled):
        ids = [stories.BOS, *tokenizer.encode(start)]  # the harness predicts BOS too where the tokenizer adds it
        assert total == pytest.approx(sum(log_p(compiled, ids)[0]), abs=1e-5 * len(ids))


def test_long_texts_roll_in_windows_and_contexts_are_cut_on_the_left(small):
    compiled, tokenizer = small
    lm = harness().FxcompressLM(compiled, tokenizer, max_length=16)
    text = " ".join(STARTS) + " hungry. He ran and ran."
    ids = tokenizer.encode(text)
    first, later = ids[:16], ids[16:]
    expected = sum(log_p(compiled, [stories.BOS, *first])[0])
    for at in range(0, len(later), 16):
        count = min(16, len(later) - at)
        end = 16 + at + count
        expected += sum(log_p(compiled, ids[end - 17 : end])[0][-count:])
    (found,) = lm.loglikelihood_rolling(asked([text]), disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-5 * len(ids))
    ((cut, _),) = lm.loglikelihood(asked([text], [" The end."]), disable_tqdm=True)
    whole = tokenizer.encode(text + " The end.")
    count = len(whole) - len(ids)
    assert cut == pytest.approx(sum(log_p(compiled, whole[-17:])[0][-count:]), abs=1e-4)


def test_greedy_text_stops_where_it_is_told(small):
    compiled, tokenizer = small
    lm = harness().FxcompressLM(compiled, tokenizer)
    wanted = [{"until": ["."], "max_gen_toks": 40}, {"until": [], "max_gen_toks": 7}]
    found = lm.generate_until(asked(STARTS[:2], wanted), disable_tqdm=True)
    for start, text, stop, count in zip(STARTS, found, (".", None), (40, 7)):
        ids = tokenizer.encode(start)
        begun = len(ids)
        while len(ids) < begun + count:
            with torch.no_grad():
                ids.append(int(compiled(torch.tensor([ids])).logits[0, -1].argmax()))
        whole = tokenizer.decode(ids[begun:])
        assert text == (whole.split(stop)[0] if stop else whole)
    assert found[0]
    with pytest.raises(EvaluationError, match=r"this task samples .* decodes greedily"):
        lm.generate_until(asked(["a"], [{"do_sample": True}]))
    with pytest.raises(EvaluationError, match="512 tokens are to be generated, and the model takes 512"):
        lm.generate_until(asked(["a"], [{"max_gen_toks": 512}]))


def test_a_task_of_a_local_file_through_simple_evaluate(small, tmp_path):
    """Choose the likelier of two ends; the accuracy is that of comparing the sums."""
    import lm_eval

    compiled, tokenizer = small
    fxcompress.save(compiled, tmp_path / "small")
    stories.model().save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    rows = [{"start": s or "He saw", "ends": [ends, " xylophone quark"], "answer": i % 2} for i, (s, ends) in
            enumerate(zip(STARTS, ENDS))]  # fmt: skip
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "ends", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "{{start}}", "doc_to_choice": "{{ends}}", "doc_to_target": "answer", "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    right = 0
    for row in rows:
        ids = [tokenizer.encode(row["start"] + end) for end in row["ends"]]
        begun = len(tokenizer.encode(row["start"]))
        sums = [sum(log_p(compiled, each)[0][begun - 1 :]) for each in ids]
        right += (sums[0] < sums[1]) == row["answer"]
    lm = harness().FxcompressLM(tmp_path / "small", tmp_path / "original")
    named = {"model": str(tmp_path / "small"), "tokenizer": str(tmp_path / "original")}
    for told in ({"model": lm}, {"model": "fxcompress", "model_args": named}):
        found = lm_eval.simple_evaluate(**told, tasks=[dict(task)], bootstrap_iters=0)
        assert found["results"]["ends"]["acc,none"] == right / len(rows)


def test_figures_are_those_of_hflm_for_a_module(small):
    pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError)
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = stories.model(), small[1]
    own, theirs = harness().FxcompressLM(model, tokenizer), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    found, expected = (lm.loglikelihood(asked(STARTS, ENDS), disable_tqdm=True) for lm in (own, theirs))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [p for p, _ in found] == pytest.approx([p for p, _ in expected], abs=1e-4)
    rolled, expected = (lm.loglikelihood_rolling(asked(STARTS[:2]), disable_tqdm=True) for lm in (own, theirs))
    assert rolled == pytest.approx(expected, abs=1e-4)
    wanted = [{"until": ["."], "max_gen_toks": 20}]
    assert own.generate_until(asked(STARTS[:1], wanted)) == theirs.generate_until(asked(STARTS[:1], wanted))


def test_what_cannot_be_called_is_refused(small):
    compiled, tokenizer = small
    with pytest.raises(EvaluationError, match="is in training mode"):
        harness().FxcompressLM(stories.model().train(), tokenizer)
    with pytest.raises(EvaluationError, match="batch_size 'auto': give a number, such as 8"):
        harness().FxcompressLM(compiled, tokenizer, batch_size="auto")
    lm = harness().FxcompressLM(compiled, tokenizer, max_length=2)
    with pytest.raises(EvaluationError, match=r"of ' were happy\.' has \d+ tokens; 1 to 2 can be scored"):
        lm.loglikelihood(asked(STARTS[1:2], ENDS[1:2]), disable_tqdm=True)


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "fxcompress.evaluation.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match=r"pip install 'fxcompress\[lm-eval\]'"):
        importlib.import_module("fxcompress.evaluation.harness")
