"""Training a small byte-level BPE vocabulary on a corpus, for models that have no tokenizer of their own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from sparseforge_core import files, specs
from sparseforge_core.data.corpora import Corpus
from sparseforge_core.errors import DataError

END_OF_TEXT = "<|endoftext|>"


def train_bpe(corpus: Corpus, size: int, home: Path) -> Path:
    """The folder's `tokenizer.json` of `size` tokens, trained on the training split once and then reused.

    The result is a function of the corpus and the size alone. Raises DataError if the corpus is too small for it.
    """
    identity = {"corpus": specs.encode(corpus), "identity": corpus.identity(), "size": size, "format": 1}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = home / "vocabularies" / key / "tokenizer.json"
    if path.is_file():
        return path
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
    tokenizer.train_from_iterator(corpus.documents("train"), trainer)
    if tokenizer.get_vocab_size() != size:
        raise DataError(
            f"the corpus yields a vocabulary of {tokenizer.get_vocab_size()} tokens, {size} were asked for; ask for "
            "fewer or give it more text"
        )
    files.write_text(path, tokenizer.to_str())
    return path
