"""How well a model does what it is for, before and after.

    tasks        labelled files and texts
    answers      embeddings and logits of texts, from any form of a model
    windows      nats of a text's tokens
    head         a linear head, read or fitted
    bootstrap    95 % intervals, of the difference too
    evaluate     these together
    command      `fxcompress eval`
    harness      FxcompressLM, for lm-evaluation-harness; imported by name, since it needs lm_eval
"""

from fxcompress.evaluation.bootstrap import Estimate
from fxcompress.evaluation.evaluate import Evaluation, Measure, evaluate
from fxcompress.evaluation.head import Head, fit_head, load_head, save_head
from fxcompress.evaluation.tasks import Classification, Perplexity, Similarity, Task, read_task

__all__ = [
    "Classification", "Estimate", "Evaluation", "Head", "Measure", "Perplexity", "Similarity", "Task", "evaluate",
    "fit_head", "load_head", "read_task", "save_head",
]  # fmt: skip
