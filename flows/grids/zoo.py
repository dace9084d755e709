"""The paper's models and corpora by name. Revisions read 'main' until a run pins what it fetched: that is unpinned."""

from __future__ import annotations

from sparseforge_core.data.corpora import C4, DOLMINO
from sparseforge_core.models.sources import Hub

__all__ = [
    "C4", "DEEPSEEK_MOE_16B", "DOLMINO", "GPT2", "GPT2_LARGE", "GPT2_MEDIUM", "GPT2_XL", "LLAMA2_13B", "LLAMA2_7B",
    "OPT_2_7B", "QWEN3_14B", "QWEN3_1_7B", "QWEN3_8B",
]  # fmt: skip

GPT2 = Hub(id="openai-community/gpt2", revision="main")
GPT2_MEDIUM = Hub(id="openai-community/gpt2-medium", revision="main")
GPT2_LARGE = Hub(id="openai-community/gpt2-large", revision="main")
GPT2_XL = Hub(id="openai-community/gpt2-xl", revision="main")
OPT_2_7B = Hub(id="facebook/opt-2.7b", revision="main")
LLAMA2_7B = Hub(id="meta-llama/Llama-2-7b-hf", revision="main")
LLAMA2_13B = Hub(id="meta-llama/Llama-2-13b-hf", revision="main")
QWEN3_1_7B = Hub(id="Qwen/Qwen3-1.7B", revision="main")
QWEN3_8B = Hub(id="Qwen/Qwen3-8B", revision="main")
QWEN3_14B = Hub(id="Qwen/Qwen3-14B", revision="main")
DEEPSEEK_MOE_16B = Hub(id="deepseek-ai/deepseek-moe-16b-base", revision="main")
