"""`fxcompress eval DIR --task FILE`: what the command line asks, as a call of `evaluate`.

    fxcompress eval ./my-minilm-4x --original ./my-minilm --task sts-dev.csv --columns 4,5,6
    fxcompress eval ./my-minilm-4x --original ./my-minilm --task dev.tsv --fit-head train.tsv
    fxcompress eval ./my-llama-4x --original ./my-llama --task stories.txt --documents

DIR is what `compress` wrote, or a folder of transformers. The tokenizer is that of --tokenizer, of --original or of
DIR, the first that is given: `compress` writes none.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from torch import nn

from fxcompress.checkpoint import MANIFEST, load
from fxcompress.core.errors import EvaluationError
from fxcompress.evaluation.answers import embeddings, encode
from fxcompress.evaluation.evaluate import MAX_LENGTH, WINDOW, Evaluation, evaluate
from fxcompress.evaluation.head import Head, fit_head, load_head, save_head
from fxcompress.evaluation.tasks import Classification, Kind, Similarity, Task, read_task
from fxcompress.hf import load_model, load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` reads."""
    parser.add_argument("folder", metavar="DIR", help="folder written by `fxcompress compress`, or by save_pretrained")
    parser.add_argument("--task", required=True, metavar="FILE", help="labelled lines with tabs, or text")
    parser.add_argument("--original", metavar="MODEL_DIR", help="the model that DIR was made from, to compare with")
    parser.add_argument("--tokenizer", metavar="MODEL_DIR", help="where the tokenizer is (default --original, or DIR)")
    parser.add_argument("--kind", choices=get_args(Kind), help="of the task, where the file does not say it")
    parser.add_argument(
        "--columns",
        metavar="A,B,C",
        help="fields of a line, by number from 0 or by name in the first line: score,text,text or text,label or "
        "text,text,label",
    )
    parser.add_argument("--examples", type=int, metavar="N", help="use the first N lines (documents) only")
    parser.add_argument("--head", metavar="FILE", help="linear head for an encoder: safetensors with weight and bias")
    parser.add_argument("--fit-head", metavar="FILE", help="fit a head to these labelled lines, on the original")
    parser.add_argument("--save-head", metavar="FILE", help="also write the fitted head")
    parser.add_argument("--classes", metavar="A,B", help="labels in the order of the logits (default the config's)")
    parser.add_argument("--documents", action="store_true", help="perplexity: blank lines part documents")
    parser.add_argument("--window", type=int, help=f"perplexity: tokens of a window (default {WINDOW}, or what fits)")
    parser.add_argument("--stride", type=int, help="perplexity: tokens from window to window (default half of it)")
    parser.add_argument("--max-length", type=int, default=MAX_LENGTH, help=f"tokens of a text (default {MAX_LENGTH})")
    parser.add_argument("--batch-size", type=int, default=32, help="texts or windows a batch (default 32)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(options: argparse.Namespace) -> Evaluation:
    """Raises what `evaluate`, `load` and transformers' folders raise, each with its own text."""
    task = read_task(options.task, options.kind, _columns(options.columns), options.documents)
    task = task if options.examples is None else first(task, options.examples)
    if (options.head or options.fit_head) and not isinstance(task, Classification):
        raise EvaluationError("--head and --fit-head are for classification, and this task is none.")
    if options.save_head and not options.fit_head:
        raise EvaluationError("--save-head writes what --fit-head fits; give that too.")
    if options.head and options.fit_head:
        raise EvaluationError("give either --head or --fit-head.")
    model = open_model(options.folder)
    original = open_model(options.original) if options.original else None
    tokenizer = load_tokenizer(_tokenizer_folder(options))
    head = load_head(options.head) if options.head else None
    if options.fit_head:
        head = _fitted(options, original or model, tokenizer)
    return evaluate(
        model,
        task,
        tokenizer,
        original=original,
        head=head,
        classes=options.classes.split(",") if options.classes else None,
        batch_size=options.batch_size,
        max_length=options.max_length,
        window=options.window,
        stride=options.stride,
        progress=not options.quiet,
    )


def open_model(folder: str) -> nn.Module:
    """A compressed graph, or a transformers model, in eval mode."""
    path = Path(folder)
    if (path / MANIFEST).is_file():
        return load(path)
    if not (path / "config.json").is_file():
        raise EvaluationError(
            f"{folder} holds neither {MANIFEST} nor config.json: give a folder written by `fxcompress compress`, or by "
            "save_pretrained."
        )
    return load_model(path)


def first(task: Task, count: int) -> Task:
    """The first `count` examples, or documents."""
    if count < 1:
        raise EvaluationError(f"--examples {count}: 1 or more are wanted.")
    if isinstance(task, Similarity):
        return Similarity(task.scores[:count], task.first[:count], task.second[:count])
    if isinstance(task, Classification):
        return Classification(task.labels[:count], task.texts[:count], task.seconds[:count])
    if len(task.texts) == 1:
        raise EvaluationError("--examples counts documents here, and the text is one: add --documents, or cut it.")
    return replace(task, texts=task.texts[:count])


def _columns(text: str | None) -> Sequence[int | str] | None:
    return None if text is None else [c.strip() for c in text.split(",")]


def _tokenizer_folder(options: argparse.Namespace) -> str:
    folder: str | None = options.tokenizer or options.original
    if folder is None:
        folder = options.folder
        if not any(Path(folder).glob("tokenizer*")) and not any(Path(folder).glob("vocab*")):
            raise EvaluationError(
                f"{folder} holds no tokenizer: give --original, the folder that it was made from, or --tokenizer."
            )
    return folder


def _fitted(options: argparse.Namespace, model: nn.Module, tokenizer: Any) -> Head:
    task = read_task(options.fit_head, "classification", None)
    assert isinstance(task, Classification)
    encoded = encode(tokenizer, task.texts, task.seconds, options.max_length)
    head = fit_head(embeddings(model, encoded, tokenizer, options.batch_size, not options.quiet), task.labels)
    if options.save_head:
        save_head(head, options.save_head)
    return head
