"""stories260K as a folder of transformers: weights, and its own vocabulary as a tokenizers file."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from benchmarks.models import stories


def write(folder: Path) -> Path:
    """Raises `DataMissing` where the model is absent."""
    stories.model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """Merges in the order of the scores of what they make; a space and BOS in front."""
    own = stories.Tokenizer()
    pieces = [piece.decode() for piece in own.pieces]
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    assert len(vocabulary) == len(pieces)
    made = sorted(range(259, len(pieces)), key=lambda i: -own.scores[i])
    merges = [
        (pieces[i][:cut], pieces[i][cut:])
        for i in made
        for cut in range(1, len(pieces[i]))
        if pieces[i][:cut] in vocabulary and pieces[i][cut:] in vocabulary
    ]
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Prepend(" ")
    bpe.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", stories.BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=stories.SEQ
    )
