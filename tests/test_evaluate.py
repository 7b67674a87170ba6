"""evaluate against figures computed another way, for every form of a model, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

import fxcompress
from benchmarks.models import data as readers
from benchmarks.models import minilm, stories
from fxcompress.core.capture import capture
from fxcompress.core.errors import EvaluationError
from fxcompress.evaluation import Classification, Head, Perplexity, Similarity, evaluate, fit_head, load_head, save_head
from fxcompress.evaluation.answers import batches, embeddings, encode
from fxcompress.evaluation.windows import windows
from fxcompress.hf import load_tokenizer
from tests import stories_folder

N = 80  # pairs of STS-B


class Letters:
    """A tokenizer of 26 letters; what evaluate needs of one, and no more."""

    pad_token_id, model_max_length = 0, 10**30

    def __call__(self, texts, seconds=None, truncation=False, max_length=1 << 30, verbose=True):
        if isinstance(texts, str):
            return {"input_ids": self.ids(texts)}
        first = [self.ids(t) for t in texts]
        second = [self.ids(t) for t in seconds] if seconds else [[] for _ in texts]
        rows = [(a + b)[:max_length] for a, b in zip(first, second)]
        types = [([0] * len(a) + [1] * len(b))[:max_length] for a, b in zip(first, second)]
        return {"input_ids": rows, "token_type_ids": types, "attention_mask": [[1] * len(row) for row in rows]}

    def ids(self, text):
        return [1 + ord(c) % 26 for c in text]


def config(**more) -> BertConfig:
    return BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=40,
        max_position_embeddings=24, **more
    )  # fmt: skip


def encoder() -> BertModel:
    torch.manual_seed(0)
    return BertModel(config()).eval()


WORDS = [f"{'abcdefgh'[i % 8] * (1 + i % 5)}{'qrstuvw'[i % 7]}" for i in range(40)]
PAIRS = Similarity(tuple(float((7 * i) % 11) for i in range(20)), tuple(WORDS[:20]), tuple(WORDS[20:]))


def test_minilm_on_sts_b_is_spearmans_correlation_of_its_embeddings(data):
    """All 1,500 pairs give .8672, as published with the data; a run of them takes a minute or more."""
    model = data(minilm.model)
    scores, first, second = readers.stsb()
    task = Similarity(tuple(scores[:N]), tuple(first[:N]), tuple(second[:N]))
    tokenizer = load_tokenizer(minilm._folder())
    graph = capture(model, minilm.batches(first[:2], 2)[0])
    found = evaluate(graph, task, tokenizer, original=model, progress=False)
    e = minilm.embed(model, [*first[:N], *second[:N]])
    expected = spearmanr((e[:N] * e[N:]).sum(1).numpy(), scores[:N]).statistic
    (measure,) = found.measures
    # Cosines of other batches differ in float32 by some 1e-6, which may swap neighbours in rank: one such swap moves
    # the correlation by 12 / (N^3 - N) at most N times over; ten swaps are the bound.
    assert measure.original.value == pytest.approx(expected, abs=10 * 12 / (N * N - 1))
    assert measure.model.value == pytest.approx(expected, abs=10 * 12 / (N * N - 1))
    assert measure.original.low < measure.original.value < measure.original.high
    spread = measure.original.high - measure.original.low
    assert measure.difference.high - measure.difference.low < spread / 10  # the graph is the same model
    assert (found.kind, found.examples, found.unit) == ("similarity", N, "pairs")


def test_stories_on_tinystories_documents_and_windows(data):
    model, paragraphs = data(stories.model), data(readers.tinystories)[:24]
    tokenizer = stories_folder.tokenizer()
    found = evaluate(model, Perplexity(tuple(paragraphs)), tokenizer, progress=False)
    nats, perplexity = found.measures
    # Means of thousands of float32 log probabilities of some 1.4, in other batches: rounding of 1e-6 each.
    assert nats.model.value == pytest.approx(stories.loss(model, paragraphs), abs=1e-5)
    assert perplexity.model.value == pytest.approx(np.exp(nats.model.value), rel=1e-12)
    assert (found.examples, found.unit) == (24, "documents")

    text = "\n".join(paragraphs)
    found = evaluate(model, Perplexity((text,)), tokenizer, window=96, stride=40, progress=False)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    total, done, end = 0.0, 1, 96
    while done < len(ids):  # one window, one token at a time
        with torch.no_grad():
            log_p = model(ids[None, max(0, end - 96) : end]).logits[0].double().log_softmax(-1)
        total -= sum(float(log_p[i - max(0, end - 96) - 1, ids[i]]) for i in range(done, end))
        done, end = end, min(end + 40, len(ids))
    assert found.measures[0].model.value == pytest.approx(total / (len(ids) - 1), abs=1e-5)
    assert found.unit == "windows"
    assert f"{len(ids) - 1:,} tokens scored, windows of 96, stride 40" in str(found)


@pytest.mark.parametrize(("window", "stride"), [(6, 3), (6, 5), (2, 1), (40, 20)])
@pytest.mark.parametrize("length", [1, 2, 6, 7, 23])
def test_every_token_but_the_first_is_scored_once(window, stride, length):
    found = list(windows(0, range(length), window, stride))
    scored = [i for w in found for i in w.ids[-w.scored :]]
    assert scored == list(range(1, length))
    assert all(len(w.ids) == min(window, length) and w.scored < len(w.ids) for w in found)
    assert all(w.ids[-w.scored] >= min(window - 1, window - stride) for w in found[1:])


def test_every_form_of_a_model_gives_the_same_figures():
    model, tokenizer = encoder(), Letters()
    inputs = {k: torch.zeros(4, 7, dtype=torch.long) for k in ("input_ids", "attention_mask", "token_type_ids")}
    inputs["attention_mask"] += 1
    compiled = fxcompress.compile(model, "2x", example_inputs=inputs, rewrites=["quantize"], progress=False)
    backend = torch.compile(encoder(), backend="fxcompress", options={"plan": compiled, "lower": "eager"})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forms = [compiled, fxcompress.apply(model, compiled), backend]
    told = [evaluate(form, PAIRS, tokenizer, original=model, batch_size=8, progress=False) for form in forms]
    assert told[0] == told[1] == told[2]
    assert told[0].measures[0].difference.value != 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_padded_and_what_is_not():
    lengths = [3, 1, 2, 3, 1]
    assert list(batches(lengths, 2, may_pad=True)) == [[1, 4], [2, 0], [3]]
    assert list(batches(lengths, 2, may_pad=False)) == [[1, 4], [2], [0, 3]]

    class Sums(nn.Module):
        """Reads no mask: padding would change its answer."""

        def forward(self, input_ids):
            hidden = F.one_hot(input_ids, 40).float()
            return {"last_hidden_state": hidden + hidden.sum(1, keepdim=True)}

    encoded = encode(Letters(), WORDS, (), 24)
    together = embeddings(Sums().eval(), encoded, Letters(), 16, False)
    alone = torch.cat([embeddings(Sums().eval(), [one], Letters(), 1, False) for one in encoded])
    assert torch.equal(together, alone)


def test_accuracy_of_a_classifier_with_names_and_pairs():
    torch.manual_seed(0)
    labels = {0: "no", 1: "yes", 2: "maybe"}
    model = BertForSequenceClassification(config(id2label=labels, label2id={v: k for k, v in labels.items()})).eval()
    model.classifier.weight.data.normal_(0, 1)
    texts, seconds = tuple(WORDS[:20]), tuple(WORDS[20:])
    right = 0
    answers = []
    for i, (a, b) in enumerate(zip(texts, seconds)):
        one = {k: torch.tensor(v) for k, v in Letters()([a], [b]).items()}
        with torch.no_grad():
            answers.append(labels[int(model(**one).logits.argmax())])
        right += answers[-1] == "maybe" if i % 2 else True
    told = tuple("maybe" if i % 2 else answer for i, answer in enumerate(answers))
    found = evaluate(model, Classification(told, texts, seconds), Letters(), progress=False)
    assert 0 < found.measures[0].model.value == right / 20
    numbers = tuple(str({v: k for k, v in labels.items()}[label]) for label in told)
    assert evaluate(model, Classification(numbers, texts, seconds), Letters(), progress=False) == found


def test_a_fitted_head_is_at_the_least_loss_and_is_kept(tmp_path):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(90, 5, generator=rng, dtype=torch.float64) * torch.tensor([1, 2, 0.1, 30, 1.0]) + 3
    labels = [("10", "2", "b")[int(i)] for i in (x[:, 0] + x[:, 1] > 9).long() + (x[:, 2] > 3).long()]
    head = fit_head(x, labels)
    assert head.classes == ("2", "10", "b")
    spread = x.std(0)
    w, b = (head.weight * spread).requires_grad_(), (head.bias + head.weight @ x.mean(0)).requires_grad_()
    y = torch.tensor([head.classes.index(label) for label in labels])
    loss = F.cross_entropy((x - x.mean(0)) / spread @ w.T + b, y, reduction="sum") + 5 / 2 * w.square().sum()
    loss.backward()
    # L-BFGS-B stops where the loss falls by less than 2.2e-9 of itself a step.
    assert float(w.grad.norm()) < 1e-2 * loss.item()
    save_head(head, tmp_path / "head.safetensors")
    again = load_head(tmp_path / "head.safetensors")
    assert torch.equal(again(x), head(x))
    assert again.classes == head.classes


def test_a_head_on_minilm_tells_sentiment(data):
    """An encoder of sentences knows sentiment well above chance: by chance 70 of 100 have odds of 4e-5."""
    model, tokenizer = data(minilm.model), load_tokenizer(minilm._folder())
    rows, judged = readers.sst2("train")[:320], readers.sst2("dev")[:100]
    encoded = encode(tokenizer, [text for text, _ in rows], (), 64)
    head = fit_head(embeddings(model, encoded, tokenizer, 32, False), [str(label) for _, label in rows])
    task = Classification(tuple(str(label) for _, label in judged), tuple(text for text, _ in judged))
    found = evaluate(model, task, tokenizer, head=head, max_length=64, progress=False)
    with torch.no_grad():
        right = 0
        for text, label in judged:
            hidden = model(**minilm.tokenize([text], 64)).last_hidden_state[0].double()
            right += int((head.weight @ hidden.mean(0) + head.bias).argmax()) == label
    assert found.measures[0].model.value == right / 100 >= 0.7


def test_the_table_and_the_json(golden):
    model = encoder()
    twin = encoder()
    torch.manual_seed(1)
    for parameter in twin.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    found = evaluate(twin, PAIRS, Letters(), original=model, progress=False)
    golden(str(found))
    told = json.loads(json.dumps(found.to_json()))
    assert told["measures"][0]["difference"]["low"] == found.measures[0].difference.low
    assert "compressed" not in str(evaluate(twin, PAIRS, Letters(), progress=False))


class Broken(nn.Module):
    """A BERT that gives NaN where the fifth letter is read."""

    def forward(self, input_ids, attention_mask):
        bad = (input_ids == 1 + ord("e") % 26).unsqueeze(-1)
        return {"last_hidden_state": torch.where(bad, torch.nan, torch.ones(*input_ids.shape, 4))}


def refusals():
    head = Head(torch.zeros(2, 7), torch.zeros(2), ("0", "1"))
    labelled = Classification(("0", "1") * 10, tuple(WORDS[:20]))
    classifier = BertForSequenceClassification(config(num_labels=2)).eval()
    unknown = Classification(("0", "4") * 10, tuple(WORDS[:20]))
    text = Perplexity(("abcdefghijk" * 20,))
    return [
        (encoder().train(), PAIRS, {}, r"BertModel is in training mode: call eval\(\) on it first"),
        (classifier, PAIRS, {}, r"gives outputs logits; an embedding, or --head, is made of last_hidden_state"),
        (encoder(), labelled, {}, r"outputs last_hidden_state, pooler_output; a class is told by logits"),
        (encoder(), labelled, {"head": head}, r"the head takes embeddings of 7 values; the model's have 32"),
        (encoder(), PAIRS, {"head": head}, r"a head is for classification, and this task is none"),
        (classifier, unknown, {}, r"example 2 has label '4', which is none of the model's 2 classes: LABEL_0, LABEL_1"),
        (classifier, labelled, {"classes": ["a"]}, r"1 classes are named, and the logits are of 2"),
        (Broken().eval(), PAIRS, {}, r"the model's answer to text 5 of 40 is NaN or infinite"),
        (BertForMaskedLM(config()).eval(), text, {}, r"change with later tokens, so it is no causal language model"),
        (encoder(), text, {"window": 25}, r"window 25, stride 12: a window has 2 to 24 tokens, a stride fewer"),
        (encoder(), text, {"window": 8, "stride": 8}, r"window 8, stride 8: a window has 2 to 24 tokens"),
        (encoder(), text, {}, r"perplexity is of logits, which models such as LlamaForCausalLM give"),
        (encoder(), Perplexity(("a",)), {}, r"the text has a single token; two or more are wanted"),
        (encoder(), PAIRS, {"batch_size": 0}, r"batch_size 0 and max_length 256: 1 and 2 are the least"),
    ]


@pytest.mark.parametrize("at", range(14))
def test_what_cannot_be_measured_is_said(at):
    torch.manual_seed(0)
    model, task, options, complaint = refusals()[at]
    with pytest.raises(EvaluationError, match=complaint):
        evaluate(model, task, Letters(), progress=False, **options)


def test_heads_that_are_none(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "head.safetensors"
    with pytest.raises(EvaluationError, match="cannot be read as safetensors"):
        load_head(path)
    path.write_bytes(b"pickle")
    with pytest.raises(EvaluationError, match="cannot be read as safetensors"):
        load_head(path)
    for tensors, said in (
        ({"w": torch.zeros(2, 3)}, r"holds w \(2, 3\); weight \(classes, d\) and bias"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(3)}, r"bias \(3,\).*are wanted"),
    ):
        save_file(tensors, path)
        with pytest.raises(EvaluationError, match=said):
            load_head(path)
    save_file({"weight": torch.ones(2, 3)}, path, metadata={"classes": '["a"]'})
    with pytest.raises(EvaluationError, match="names 1 classes and has 2 rows"):
        load_head(path)
    with pytest.raises(EvaluationError, match="every label is 'x'"):
        fit_head(torch.zeros(3, 2), ["x"] * 3)
