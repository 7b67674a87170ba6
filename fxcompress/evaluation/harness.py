"""FxcompressLM: a compressed causal language model as lm-evaluation-harness calls one.

    import lm_eval
    from fxcompress.evaluation.harness import FxcompressLM

    lm_eval.simple_evaluate(model=FxcompressLM("my-llama-4x", "my-llama"), tasks=["hellaswag"])

Importing this also registers the name: `simple_evaluate(model="fxcompress", model_args={"model": ..., "tokenizer":
...})`. Tokens, prefixes and windows are those of its own HFLM, so that figures compare. A graph has no cache: what it
generates, greedily, costs a whole call a token. To sample, or generate much, give HFLM a module of `fxcompress.apply`,
unless it shares weights: HFLM ties them anew, which compressed leaves refuse. Needs the extra `fxcompress[lm-eval]`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fxcompress.core.errors import EvaluationError
from fxcompress.evaluation.answers import batches, room
from fxcompress.evaluation.command import open_model
from fxcompress.evaluation.windows import check_causal, log_probabilities
from fxcompress.hf import load_tokenizer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError("FxcompressLM needs lm-evaluation-harness: pip install 'fxcompress[lm-eval]'.") from error

MAX_LENGTH, NEW_TOKENS = 2048, 256  # HFLM's, where nothing says otherwise
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one thing

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, context, continuation


@register_model("fxcompress")
class FxcompressLM(TemplateLM):
    """What `compile`, `load`, `apply` or `lower` returned, torch.compile, or a folder; and a tokenizer, or its folder.

    max_length: tokens of context and continuation; by default what the model takes, or 2048.
    device: where a folder's model goes; a module stays where it is.

    Raises `EvaluationError` for a model that sees later tokens.
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        tokenizer: Any,
        *,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,  # of "auto"
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            model = open_model(os.fspath(model)).to(device or "cpu")
        if model.training:
            raise EvaluationError(f"{type(model).__name__} is in training mode: call eval() on it first.")
        if not str(batch_size or 8).isdecimal():
            raise EvaluationError(f"batch_size {batch_size!r}: give a number, such as 8.")
        self.model = model
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str | os.PathLike) else tokenizer
        self.batch_size = int(batch_size or 8)
        fits = [n for n in (room(model), getattr(self.tokenizer, "model_max_length", None)) if n]
        self.max_length = max_length or min([*fits, MAX_LENGTH] if room(model) is None else fits)
        check_causal(model, self.tok_encode("The quick brown fox jumps over the lazy dog."))

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """Of its cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens; special ones as the tokenizer adds them, and not twice."""
        begins = string.startswith(str(self.tokenizer.decode([self.prefix_token_id])))
        special = not begins if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer.encode(string, add_special_tokens=special))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each text, every token predicted once."""
        texts = [request.args[0] for request in requests]
        parts = [
            [make_disjoint_window(pair) for pair in get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, 1)]
            for text in texts
        ]  # fmt: skip
        every: list[Request] = [(None, context, scored) for windows in parts for context, scored in windows]
        found = iter(self._loglikelihood_tokens(every, disable_tqdm=disable_tqdm))
        sums = [sum(next(found)[0] for _ in windows) for windows in parts]
        for text, total in zip(texts, sums):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether greedy decoding would give it) for each; contexts are cut on the left."""
        for texts, _context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                of = f" of {texts[1][:40]!r}" if texts else ""
                raise EvaluationError(
                    f"a continuation{of} has {len(continuation)} tokens; 1 to {self.max_length} can be scored."
                )
        rows = [(context + scored)[-(self.max_length + 1) : -1] for _texts, context, scored in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        groups = list(batches([len(row) for row in rows], self.batch_size, may_pad=True))
        for group in tqdm(groups, "loglikelihood", unit="batch", disable=disable_tqdm, leave=False):
            for i, log_p in zip(group, log_probabilities(self.model, [rows[i] for i in group])):
                texts, _context, scored = requests[i]
                targets, own = torch.tensor(scored), log_p[-len(scored) :]
                total = float(own.gather(1, targets.unsqueeze(1)).double().sum())
                found[i] = total, bool((own.argmax(1) == targets).all())
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, found[i])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy text, up to the first stop, the tokenizer's end, or as many tokens as are asked for."""
        asked = [(*request.args, *_told(request.args[1])) for request in requests]
        found = [""] * len(asked)
        bar = tqdm(total=len(asked), desc="generate", unit="text", disable=disable_tqdm, leave=False)
        with bar:
            for start in range(0, len(asked), self.batch_size):
                chunk = asked[start : start + self.batch_size]
                for i, text in enumerate(self._generated(chunk), start):
                    found[i] = text
                    self.cache_hook.add_partial("generate_until", asked[i][:2], text)
                bar.update(len(chunk))
        return found

    def _generated(self, asked: Sequence[tuple[str, Any, list[str], int]]) -> list[str]:
        most = max(count for *_, count in asked)
        if most >= self.max_length:
            raise EvaluationError(
                f"{most} tokens are to be generated, and the model takes {self.max_length} with the text before them."
            )
        rows = [self.tok_encode(text)[-(self.max_length - count) :] for text, _, _, count in asked]
        made: list[list[int]] = [[] for _ in rows]
        texts: list[str | None] = [None] * len(rows)
        while any(text is None for text in texts):
            live = [i for i, text in enumerate(texts) if text is None]
            answers = log_probabilities(self.model, [rows[i] + made[i] for i in live])
            for i, log_p in zip(live, answers):
                token, (_, _, until, count) = int(log_p[-1].argmax()), asked[i]
                ended = token == self.eot_token_id
                made[i] += [] if ended else [token]
                text = self.tokenizer.decode(made[i], skip_special_tokens=True)
                if ended or len(made[i]) >= count or any(stop in text for stop in until):
                    texts[i] = min((text.split(stop)[0] for stop in until), key=len, default=text)
        return [text or "" for text in texts]


def _told(options: Mapping[str, Any]) -> tuple[list[str], int]:
    """-> (stops, tokens to generate at most). Raises `EvaluationError` where sampling is asked."""
    if options.get("do_sample") or (options.get("temperature") and "do_sample" not in options):
        raise EvaluationError(
            "this task samples (do_sample, temperature), and FxcompressLM decodes greedily: pass "
            "gen_kwargs='do_sample=False', or give HFLM a module of fxcompress.apply."
        )
    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    return [s for s in stops if s], int(next((options[n] for n in LENGTHS if options.get(n)), NEW_TOKENS))
