"""A real tokenizer, trained in a moment."""

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers


def train_tokenizer(file: Path, text: str, vocabulary: int = 300, special: tuple[str, ...] = ()) -> Path:
    """A byte-level BPE of so many tokens, which therefore knows every text; written to `file`."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(file))
    return file
