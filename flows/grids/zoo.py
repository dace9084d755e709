"""The paper's models, each pinned to a commit of the hub, and its corpora (pinned in `data/corpora.py`).

Names and sizes are in `flows/placements.py`. The LLaMA models are gated: the hub asks for their licence to be accepted.
"""

from __future__ import annotations

from sparseforge_core.data.corpora import C4, DOLMINO
from sparseforge_core.models.sources import Hub

__all__ = [
    "C4", "DEEPSEEK_MOE_16B", "DOLMINO", "GPT2", "GPT2_LARGE", "GPT2_MEDIUM", "GPT2_XL", "LLAMA2_13B", "LLAMA2_7B",
    "OPT_125M", "OPT_1_3B", "OPT_2_7B", "OPT_350M", "QWEN3_14B", "QWEN3_1_7B", "QWEN3_8B",
]  # fmt: skip

GPT2 = Hub(id="openai-community/gpt2", revision="607a30d783dfa663caf39e06633721c8d4cfcd7e")
GPT2_MEDIUM = Hub(id="openai-community/gpt2-medium", revision="6dcaa7a952f72f9298047fd5137cd6e4f05f41da")
GPT2_LARGE = Hub(id="openai-community/gpt2-large", revision="32b71b12589c2f8d625668d2335a01cac3249519")
GPT2_XL = Hub(id="openai-community/gpt2-xl", revision="15ea56dee5df4983c59b2538573817e1667135e2")
OPT_125M = Hub(id="facebook/opt-125m", revision="27dcfa74d334bc871f3234de431e71c6eeba5dd6")
OPT_350M = Hub(id="facebook/opt-350m", revision="08ab08cc4b72ff5593870b5d527cf4230323703c")
OPT_1_3B = Hub(id="facebook/opt-1.3b", revision="3f5c25d0bc631cb57ac65913f76e22c2dfb61d62")
OPT_2_7B = Hub(id="facebook/opt-2.7b", revision="905a4b602cda5c501f1b3a2650a4152680238254")
LLAMA2_7B = Hub(id="meta-llama/Llama-2-7b-hf", revision="01c7f73d771dfac7d292323805ebc428287df4f9")
LLAMA2_13B = Hub(id="meta-llama/Llama-2-13b-hf", revision="5c31dfb671ce7cfe2d7bb7c04375e44c55e815b1")
QWEN3_1_7B = Hub(id="Qwen/Qwen3-1.7B", revision="70d244cc86ccca08cf5af4e1e306ecf908b1ad5e")
"""Post-trained, like 8B and 14B: the paper's dense perplexities are those of the post-trained models."""
QWEN3_8B = Hub(id="Qwen/Qwen3-8B", revision="b968826d9c46dd6066d109eabc6255188de91218")
QWEN3_14B = Hub(id="Qwen/Qwen3-14B", revision="40c069824f4251a91eefaf281ebe4c544efd3e18")
DEEPSEEK_MOE_16B = Hub(id="deepseek-ai/deepseek-moe-16b-base", revision="521d2bc4fb69a3f3ae565310fcc3b65f97af2580")
"""The checkpoint has the older model type `deepseek`, which transformers lacks: `models/deepseek.py` builds it, with
fused experts, and the code in the repository does not run."""
