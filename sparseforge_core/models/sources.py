"""Where a model comes from: a spec of a few words, resolved by `models.hub`. Nothing here is loaded or fetched."""

from __future__ import annotations

from typing import Literal

from sparseforge_core.data.corpora import Corpus
from sparseforge_core.errors import RecipeError
from sparseforge_core.specs import spec


class TokenizerSource:
    """Base of everything that can name a tokenizer."""


@spec("trained-bpe")
class TrainedBPE(TokenizerSource):
    """A byte-level BPE vocabulary trained on the training split of a corpus; deterministic, cached by identity."""

    corpus: Corpus
    size: int
    """Number of tokens in the vocabulary, the special end-of-text token included."""


@spec("tokenizer-dir")
class TokenizerDir(TokenizerSource):
    """A folder with a `tokenizer.json`."""

    path: str
    sha256: str
    """SHA-256 of the tokenizer.json, so that the identity is of its contents."""


class ModelSource:
    """Base of everything that can name a model. Each source also names its tokenizer."""


@spec("hub")
class Hub(ModelSource):
    """A model of the Hugging Face hub at a pinned revision."""

    id: str
    revision: str
    """A commit hash; 'main' is accepted and recorded as what it is: unpinned."""


@spec("packaged")
class Packaged(ModelSource):
    """A pretrained model that an installed Python package carries."""

    name: Literal["smollm2-135m"]


@spec("local")
class Local(ModelSource):
    """A folder written by `save_pretrained`."""

    path: str
    sha256: str
    """SHA-256 over the weight files' hashes, so that the identity is of the contents, not of the path."""


@spec("tiny")
class Tiny(ModelSource):
    """A small randomly initialised model of one family, from a configuration declared in code."""

    architecture: Literal["gpt2", "opt", "llama", "qwen3", "deepseek_moe"]
    tokenizer: TokenizerSource
    width: int = 128
    layers: int = 4
    heads: int = 4
    positions: int = 512
    """Longest sequence the model accepts."""
    init_seed: int = 0

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % 16:
            raise RecipeError(f"width={self.width}: must be a multiple of heads={self.heads} and of 16")
