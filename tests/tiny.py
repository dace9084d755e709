"""Tiny random models of every family, built straight from our configurations: the workhorses of the tests."""

from __future__ import annotations

from typing import Any

import torch

from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.models.families import FAMILIES, family_of
from sparseforge_core.models.hub import from_config
from sparseforge_core.models.sites import Site, find_sites
from sparseforge_core.models.sources import Tiny, TrainedBPE
from sparseforge_core.models.tiny import CONFIGURATIONS, tiny_config
from tests.deepseek_original import DeepseekConfig, DeepseekForCausalLM

ARCHITECTURES = ("llama", "qwen3", "opt", "gpt2", "deepseek_moe")
"""Those of the demo."""

EVERY_ARCHITECTURE = (
    *(name for name in CONFIGURATIONS if name in FAMILIES or name == "deepseek_moe"),
    "deepseek-original",
)
"""One of every declared model type, and DeepSeek's own layout."""

MIXTURES = (
    "deepseek-original", "deepseek", "deepseek_moe", "deepseek_v3", "mixtral", "olmoe", "phimoe", "granitemoe",
    "qwen2_moe", "qwen3_moe", "glm4_moe", "dots1", "ernie4_5_moe", "hunyuan_v1_moe", "gpt_oss", "llama4_text",
)  # fmt: skip
"""Those with experts."""

VOCABULARY = 64


def tiny_source(architecture: str, **changes: Any) -> Tiny:
    """A source of the smallest useful size: 2 layers, width 64."""
    tokenizer = TrainedBPE(corpus=Synthetic(documents_count=50), size=300)
    values = {"width": 64, "layers": 2, "heads": 2, "positions": 64, **changes}
    return Tiny(architecture=architecture, tokenizer=tokenizer, **values)  # type: ignore[arg-type]


def tiny_model(architecture: str, seed: int = 0, **changes: Any) -> Any:
    """A random float32 model in evaluation mode with a vocabulary of 64."""
    if architecture == "deepseek-original":  # a Linear for each matrix of each expert, as published
        torch.manual_seed(seed)
        return DeepseekForCausalLM(DeepseekConfig(vocab_size=VOCABULARY)).eval()
    config = tiny_config(tiny_source(architecture, **changes), VOCABULARY, 0)
    for name in ("attention_dropout", "dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if getattr(config, name, None):
            setattr(config, name, 0.0)
    torch.manual_seed(seed)
    return from_config(config).eval()


def sites_of(model: Any) -> list[Site]:
    """The maskable weights of a tiny model."""
    return find_sites(model, family_of(model.config.model_type))


def tokens(batch: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Random token ids `[batch, length]`."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
