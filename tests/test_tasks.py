"""Task files: what each is taken for, and what is said of the ones that are nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.models import data as readers
from fxcompress.core.errors import EvaluationError
from fxcompress.evaluation.tasks import Classification, Perplexity, Similarity, read_task


@pytest.fixture
def written(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "task.tsv"
        path.write_bytes(text.encode())
        return path

    return write


PAIRS = Similarity((0.5, 4.0), ("a man", "a dog"), ('the "man', "it's a dog"))


@pytest.mark.parametrize(
    "text",
    [
        '0.5\ta man\tthe "man\n4\ta dog\tit\'s a dog\n',
        '\ufeffscore\tsentence1\tsentence2\r\n0.5\ta man\tthe "man\r\n\r\n4\ta dog\tit\'s a dog',
        'sentence1\tsentence2\tscore\na man\tthe "man\t0.5\na dog\tit\'s a dog\t4\n',
    ],
)
def test_a_number_and_two_texts_are_similarity(written, text):
    assert read_task(written(text)) == PAIRS


@pytest.mark.parametrize(
    "text", ["good\t1\nso bad\t0\n", "sentence\tlabel\ngood\t1\nso bad\t0\n", "1\tgood\n0\tso bad"]
)
def test_a_text_and_a_whole_number_are_classification(written, text):
    assert read_task(written(text)) == Classification(("1", "0"), ("good", "so bad"))


def test_labels_that_are_words_need_the_kind(written):
    path = written("good\tpositive\nso bad\tnegative\n")
    with pytest.raises(EvaluationError, match="has 2 fields in most lines, which does not say what it is"):
        read_task(path)
    assert read_task(path, kind="classification") == Classification(("positive", "negative"), ("good", "so bad"))


def test_columns_by_number_and_by_name(written):
    path = written("i\ts2\tscore\ts1\textra\n0\tb\t1\ta\tx\n1\td\t2\tc\tx\n")
    wanted = Similarity((1.0, 2.0), ("a", "c"), ("b", "d"))
    assert read_task(path, columns=["score", "s1", "s2"]) == read_task(path, columns=[2, 3, 1]) == wanted
    pairs = read_task(path, kind="classification", columns=["s1", "s2", "i"])
    assert pairs == Classification(("0", "1"), ("a", "c"), ("b", "d"))
    assert read_task(path, columns=["s1", "i"]) == Classification(("0", "1"), ("a", "c"))


def test_text_without_tabs_is_for_perplexity(written):
    text = "Once upon\na time.\n\n \n\nThe end.\n"
    assert read_task(written(text)) == Perplexity((text,))
    assert read_task(written(text), documents=True) == Perplexity(("Once upon\na time.", "The end."))
    assert read_task(written("1\ta\tb\n2\tc\td"), kind="perplexity") == Perplexity(("1\ta\tb\n2\tc\td",))


@pytest.mark.parametrize(
    ("text", "options", "complaint"),
    [
        ("1\ta\tb\n2\tc\td\n3\te\n", {}, r"line 3 has 2 fields; wanted are score in field 0, text in field 1, text in"),
        ("1\ta\tb\n2\tc\td\n\nlow\te\tf\n", {}, r"line 4: the score 'low' is no number"),
        ("1\ta\tb\n2\tc\td\nnan\te\tf\n", {}, r"line 3: the score 'nan' is no number"),
        ("1\ta\tb\n2\tc\t \n", {}, r"line 2: the text in field 2 is empty"),
        ("1\ta\tb\n1\tc\td\n", {}, r"every score is 1, and nothing correlates with that"),
        ("good\t1\nbad\n fine\t0\n", {}, r"line 2 has 1 field; wanted are text in field 0, label in field 1"),
        ("a\tb\tc\nd\te\tf\n", {}, r"has 3 fields in most lines.*--columns 4,5,6"),
        ("a\tb\tc\nd\te\tf\n", {"kind": "similarity"}, r"which does not say what is what for similarity"),
        ("1\ta\tb\n2\tc\td\n", {"kind": "translation"}, r"kind 'translation' is none of similarity, classification"),
        ("1\ta\tb\n2\tc\td\n", {"columns": ["score", "1", "2"]}, r"no column 'score': its first line is 1, a, b"),
        ("1\ta\tb\n2\tc\td\n", {"columns": [0, 1, 1]}, r"columns 0, 1, 1: name each once"),
        ("1\ta\tb\n2\tc\td\n", {"columns": [0]}, r"1 columns: name three \(score, text, text\) for similarity"),
        ("1\ta\tb\n2\tc\td\n", {"documents": True}, r"is a task of similarity; documents are of perplexity"),
        ("text", {"kind": "perplexity", "columns": [0, 1]}, r"columns name fields of labelled lines"),
        ("\n \n", {}, r"is empty"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(written, text, options, complaint):
    with pytest.raises(EvaluationError, match=complaint):
        read_task(written(text), **options)


def test_files_that_are_not_there_or_not_text(tmp_path: Path):
    with pytest.raises(EvaluationError, match=r"task file .*no.tsv cannot be read: No such file"):
        read_task(tmp_path / "no.tsv")
    (tmp_path / "latin.tsv").write_bytes(b"1\tcaf\xe9\tb\n")
    with pytest.raises(EvaluationError, match=r"latin.tsv is not UTF-8 \(byte 5\); convert it first"):
        read_task(tmp_path / "latin.tsv")


def test_sts_b_and_sst_2_as_they_are_published(data):
    scores, first, second = data(readers.stsb)
    path = readers.find("text/stsb/sts-dev.csv")
    assert read_task(path, columns=[4, 5, 6]) == Similarity(
        tuple(scores), tuple(s.strip() for s in first), tuple(s.strip() for s in second)
    )
    with pytest.raises(EvaluationError, match="has 7 fields in most lines"):
        read_task(path)
    sentiment = read_task(readers.find("text/sst2/dev.tsv"))
    assert isinstance(sentiment, Classification)
    assert [(t, int(label)) for t, label in zip(sentiment.texts, sentiment.labels)] == readers.sst2("dev")
