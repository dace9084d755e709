"""Training a small byte-level BPE vocabulary on a corpus, for models that have no tokenizer of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseforge_core import files, specs
from sparseforge_core.data.cache import content_key, made_once
from sparseforge_core.data.corpora import Corpus
from sparseforge_core.data.textfiles import END_OF_TEXT
from sparseforge_core.errors import DataError

SMALLEST = 257
"""One token for each byte and the end of text."""


def train_bpe(corpus: Corpus, size: int, home: Path) -> Path:
    """The `tokenizer.json` of `size` tokens under HOME/vocabularies/<key>/, trained on the training split once.

    The result is a function of the corpus and the size alone. Raises DataError for a size below 257 and for a corpus
    that is too small for it.
    """
    if size < SMALLEST:
        raise DataError(f"a vocabulary of {size} tokens: it needs at least {SMALLEST}, the bytes and {END_OF_TEXT}")
    identity = {"corpus": specs.encode(corpus), "identity": corpus.identity(), "size": size, "format": 2}

    def make(folder: Path) -> None:
        files.write_text(folder / "tokenizer.json", _train(corpus, size, home).to_str())

    return made_once(home / "vocabularies" / content_key(identity), make) / "tokenizer.json"


def _train(corpus: Corpus, size: int, home: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.documents("train", home), trainer)
    if tokenizer.get_vocab_size() != size:
        raise DataError(
            f"the corpus yields a vocabulary of {tokenizer.get_vocab_size()} tokens, {size} were asked for; ask for "
            "fewer or give it more text"
        )
    return tokenizer
