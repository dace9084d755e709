"""Where a model comes from: a spec of a few words, resolved by `models.hub`. Nothing here is loaded or fetched."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Literal

from sparseforge_core.data.corpora import DATA_ENV, Corpus, check_hub_id, located
from sparseforge_core.errors import DataError, RecipeError
from sparseforge_core.specs import spec

FamilyChoice = Literal["declared", "automatic"]
"""Whether the masked weights are those of a declared family, or those that the model's own modules say.

The recipe chooses, so that its key says what is masked: a family declared later changes no old recipe.
"""


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
    """A relative one lies under $SPARSEFORGE_DATA (default: the current folder), as files of corpora do."""
    sha256: str
    """SHA-256 of the tokenizer.json, so that the identity is of its contents."""

    def checked(self) -> Path:
        """Where the tokenizer.json is, once it is the one in the recipe. Raises DataError for another one."""
        file = located(Path(self.path) / "tokenizer.json")
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != self.sha256:
            raise DataError(
                f"{file} is missing or is not the tokenizer that the recipe names; relative paths start at ${DATA_ENV}"
            )
        return file


class ModelSource:
    """Base of everything that can name a model. Each source also names its tokenizer."""


@spec("hub")
class Hub(ModelSource):
    """A model of the Hugging Face hub at a pinned revision."""

    id: str
    revision: str
    """A commit hash; 'main' is accepted and recorded as what it is: unpinned."""
    remote_code: bool = False
    """Whether the Python code in the repository may run, for models that transformers lacks; needs a full hash."""
    family: FamilyChoice = "declared"
    """Which rules say what is masked."""

    def __post_init__(self) -> None:
        check_hub_id(self.id)
        if self.remote_code and not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise RecipeError(
                f"remote_code=True with revision={self.revision!r}: code of the hub runs only from a pinned commit; "
                f"give all 40 hexadecimal digits of a commit of {self.id}"
            )


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
    family: FamilyChoice = "declared"
    """Which rules say what is masked."""


Architecture = Literal[
    "gpt2", "opt", "llama", "qwen3", "deepseek_moe",
    "mistral", "qwen2", "olmo", "olmo2", "olmo3", "gemma", "gemma2", "gemma3_text", "cohere", "cohere2", "granite",
    "stablelm", "smollm3", "ernie4_5", "hunyuan_v1_dense", "seed_oss", "phi", "phi3", "glm", "glm4", "gpt_neox",
    "falcon", "bloom", "starcoder2", "gpt_bigcode", "mixtral", "olmoe", "phimoe", "granitemoe", "qwen2_moe",
    "qwen3_moe", "deepseek", "deepseek_v3", "glm4_moe", "dots1", "ernie4_5_moe", "hunyuan_v1_moe", "gpt_oss",
    "llama4_text",
    "nemotron", "mpt", "gptj",
]  # fmt: skip
"""Configurations of `models.tiny`: model types, but for "deepseek_moe", which is a deepseek_v2. The last line's have no
declared family."""


@spec("tiny")
class Tiny(ModelSource):
    """A randomly initialised model of one family, from a configuration declared in code; small unless told else."""

    architecture: Architecture
    tokenizer: TokenizerSource
    width: int = 128
    layers: int = 4
    heads: int = 4
    positions: int = 512
    """Longest sequence the model accepts."""
    mlp: int | None = None
    """Inner width of the MLP; None: two or three times the model's, as the architecture's configuration says."""
    init_seed: int = 0
    family: FamilyChoice = "declared"
    """Which rules say what is masked."""

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % 16:
            raise RecipeError(f"width={self.width}: must be a multiple of heads={self.heads} and of 16")
        if self.mlp is not None and (self.mlp < 16 or self.mlp % 16):
            raise RecipeError(f"mlp={self.mlp}: must be a multiple of 16, at least 16")
