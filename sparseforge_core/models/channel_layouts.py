"""Where each family's weights have the channels whose order is free, as data; `channels.py` reads it.

Names are regular expressions of parameters. Within an MLP or an expert each pair of matrices shares its hidden units;
attention reads each head's values by one or more query heads; everything else touches the residual stream along one
dimension, or not at all. Every declared family is here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sparseforge_core.models.families.deepseek_moe import DEEPSEEK, DEEPSEEK_MOE, ERNIE_MOE, GLM4_MOE, HUNYUAN_MOE
from sparseforge_core.models.families.falcon import FALCON
from sparseforge_core.models.families.glm import GLM
from sparseforge_core.models.families.gpt2 import GPT2
from sparseforge_core.models.families.gpt_bigcode import GPT_BIGCODE
from sparseforge_core.models.families.gpt_neox import GPT_NEOX
from sparseforge_core.models.families.llama import LLAMA, LLAMA_BLOCK
from sparseforge_core.models.families.mixtral import GRANITEMOE, MIXTRAL, OLMOE, PHIMOE
from sparseforge_core.models.families.opt import OPT
from sparseforge_core.models.families.phi import PHI, PHI3
from sparseforge_core.models.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from sparseforge_core.models.families.starcoder2 import STARCODER2
from sparseforge_core.models.families.transposed_experts import GPT_OSS, LLAMA4

APART = -1
"""In place of a dimension: the parameter has no channel of the residual stream."""


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Channels between layers under one prefix, such as an MLP's hidden units."""

    prefix: str
    read: str
    """The layer whose inputs they are."""
    made: tuple[tuple[str, int], ...]
    """Layers whose outputs they are, and at which multiple of their number they begin there: 1 for the second half of a
    fused matrix."""
    what: str = "units"
    transposed: bool = False
    """Whether weights are stored `[in, out]`."""


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Experts whose matrices are two tensors, `gate_up_proj` and `down_proj`, `[experts, out, in]`."""

    prefix: str
    transposed: bool = False
    """Whether they are `[experts, in, out]`."""
    interleaved: bool = False
    """Whether gate and up alternate; else one follows the other."""


@dataclass(frozen=True)
class Heads:
    """How one attention's values are laid out."""

    count: int
    """Heads of values."""
    readers: int
    """Query heads that read each."""
    width: int
    start: Callable[[int], int]
    """The row of the layer of values where a head's begin."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A family's free channels."""

    stream: dict[str, int]
    """By a parameter's name, first match: the dimension along which it has the residual stream, or `APART`."""
    attention: str = r"model\.layers\.\d+\.self_attn"
    values: str = "v_proj"
    output: str = "o_proj"
    heads: Callable[[Any], Heads]
    inner: tuple[Inner, ...] = ()
    experts: tuple[Experts, ...] = ()
    transposed: bool = False
    projected: tuple[str, str] | None = None
    """Where a model has a parameter of the first name, those of the second are apart: OPT-350M embeds in fewer channels
    than its stream has, and projects."""


def _sizes(config: Any) -> tuple[int, int, int]:
    """Heads of values, query heads that read each, channels of each."""
    queries = int(config.num_attention_heads)
    heads = int(getattr(config, "num_key_value_heads", None) or queries)
    return heads, queries // heads, int(getattr(config, "head_dim", None) or config.hidden_size // queries)


def _own_matrix(config: Any) -> Heads:
    """Values have a matrix of their own."""
    heads, readers, width = _sizes(config)
    return Heads(heads, readers, width, lambda head: head * width)


def _after_keys(config: Any) -> Heads:
    """One matrix: all queries, all keys, all values."""
    heads, readers, width = _sizes(config)
    return Heads(heads, readers, width, lambda head: ((readers + 1) * heads + head) * width)


def _by_head(config: Any) -> Heads:
    """One matrix: query, key and value of the first head, then of the next."""
    queries = int(config.num_attention_heads)
    width = int(config.hidden_size) // queries
    return Heads(queries, 1, width, lambda head: (3 * head + 2) * width)


def _bigcode(config: Any) -> Heads:
    if not config.multi_query:
        return _by_head(config)
    queries, width = int(config.num_attention_heads), int(config.hidden_size) // int(config.num_attention_heads)
    return Heads(1, queries, width, lambda _: (queries + 1) * width)


def _falcon(config: Any) -> Heads:
    """Falcon and BLOOM. Falcon's newer layout has each key and value after the queries that read them."""
    queries, width = int(config.num_attention_heads), int(config.hidden_size) // int(config.num_attention_heads)
    if getattr(config, "new_decoder_architecture", False):
        heads = int(config.num_kv_heads)
        readers = queries // heads
        return Heads(heads, readers, width, lambda head: (head * (readers + 2) + readers + 1) * width)
    if getattr(config, "multi_query", False):
        return Heads(1, queries, width, lambda _: (queries + 1) * width)
    return _by_head(config)


def _latent(config: Any) -> Heads:
    """DeepSeek's: a head's keys without position, then its values, out of one latent."""
    width, keys = int(config.v_head_dim), int(config.qk_nope_head_dim)
    return Heads(int(config.num_attention_heads), 1, width, lambda head: head * (keys + width) + keys)


_GATED = Inner(prefix=r".+", read="down_proj", made=(("gate_proj", 0), ("up_proj", 0)))
"""An MLP, a shared expert, an expert with its own layers."""
_FUSED = Inner(prefix=r".+", read="down_proj", made=(("gate_up_proj", 0), ("gate_up_proj", 1)))
_EXPERTS = Experts(prefix=r".+\.experts")

_NORMS = (
    r"model\.layers\.\d+\.(input|post_attention|post_self_attn|post_mlp|(pre|post)_feedforward)_layernorm"
    r"\.(weight|bias)|model\.(norm|final_layernorm)\.(weight|bias)"
)
_LLAMA_STREAM = {
    r".*\.experts\.gate_up_proj": 2,
    r".*\.experts\.down_proj": 1,
    r".*\.(router|gate|gate\.wg|shared_expert_gate)\.weight": 1,
    r"model\.embed_tokens\.weight|lm_head\.weight": 1,
    r".*\.(q|k|v|qkv|gate|up|gate_up)_proj\.weight": 1,
    r".*\.(o|down)_proj\.(weight|bias)": 0,
    _NORMS: 0,
    r".*\.(q|k|v|gate|up)_proj\.bias|lm_head\.bias|.*\.self_attn\.(q|k|query|key)_(layer)?norm\..*": APART,
}
_LLAMA = Layout(stream=_LLAMA_STREAM, heads=_own_matrix, inner=(_GATED,))
_MIXTURE = replace(
    _LLAMA,
    experts=(_EXPERTS,),
    stream={**_LLAMA_STREAM, r".*\.router\.bias|.*\.e_score_correction_bias": APART},
)
_TRANSPOSED_EXPERTS = {
    r".*\.experts\.gate_up_proj": 1,
    r".*\.experts\.down_proj": 2,
    r".*\.experts\.down_proj_bias": 1,
    r".*\.experts\.gate_up_proj_bias|.*\.self_attn\.sinks": APART,
}

_GPT2_STREAM = {
    r"transformer\.w[tp]e\.weight|lm_head\.weight": 1,
    r".*\.c_proj\.bias|.*\.ln_(1|2|f)\.(weight|bias)": 0,
    r".*\.(c_attn|c_fc)\.bias": APART,
}
_TWO = Inner(prefix=r".+\.mlp", read="c_proj", made=(("c_fc", 0),))
_NEOX_MLP = Inner(prefix=r".+\.mlp", read="dense_4h_to_h", made=(("dense_h_to_4h", 0),))
_NEOX_STREAM = {
    r".*\.(word_embeddings|embed_in)\.weight|lm_head\.weight": 1,
    r".*\.(query_key_value|dense_h_to_4h)\.weight": 1,
    r".*\.(dense|dense_4h_to_h)\.(weight|bias)": 0,
    r".*(layernorm|layer_norm|\.ln_f|\.ln_attn|\.ln_mlp)\.(weight|bias)": 0,
    r".*\.(query_key_value|dense_h_to_4h)\.bias": APART,
}

LAYOUTS: dict[str, Layout] = {
    **{family.name: _LLAMA for family in (LLAMA, *LLAMA_BLOCK)},
    GLM.name: replace(_LLAMA, inner=(_FUSED,)),
    PHI3.name: replace(_LLAMA, inner=(_FUSED,), values="qkv_proj", heads=_after_keys),
    STARCODER2.name: replace(
        _LLAMA,
        inner=(_TWO,),
        stream={**_LLAMA_STREAM, r".*\.c_fc\.weight": 1, r".*\.c_proj\.(weight|bias)": 0, r".*\.c_fc\.bias": APART},
    ),
    PHI.name: replace(
        _LLAMA,
        output="dense",
        inner=(Inner(prefix=r".+\.mlp", read="fc2", made=(("fc1", 0),)),),
        stream={**_LLAMA_STREAM, r".*\.fc1\.weight": 1, r".*\.(fc2|dense)\.(weight|bias)": 0, r".*\.fc1\.bias": APART},
    ),
    **{
        family.name: _MIXTURE
        for family in (
            MIXTRAL, OLMOE, PHIMOE, GRANITEMOE, QWEN2_MOE, QWEN3_MOE, DEEPSEEK, GLM4_MOE, ERNIE_MOE, HUNYUAN_MOE,
        )
    },
    DEEPSEEK_MOE.name: replace(
        _MIXTURE,
        values="kv_b_proj",
        heads=_latent,
        inner=(
            _GATED,
            Inner(
                prefix=r".+\.self_attn",
                read="kv_b_proj",
                made=(("kv_a_proj_with_mqa", 0), ("kv_a_layernorm", 0)),
                what="latent",
            ),
            Inner(
                prefix=r".+\.self_attn",
                read="q_b_proj",
                made=(("q_a_proj", 0), ("q_a_layernorm", 0)),
                what="latent of queries",
            ),
        ),
        stream={
            **_MIXTURE.stream,
            r".*\.(kv_a_proj_with_mqa|q_a_proj)\.weight": 1,
            r".*\.(kv_a_proj_with_mqa|q_a_proj)\.bias|.*\.(kv|q)_b_proj\.weight|.*\.(kv|q)_a_layernorm\.weight": APART,
        },
    ),
    GPT_OSS.name: replace(
        _MIXTURE,
        experts=(replace(_EXPERTS, transposed=True, interleaved=True),),
        stream={**_MIXTURE.stream, **_TRANSPOSED_EXPERTS},
    ),
    LLAMA4.name: replace(
        _MIXTURE,
        experts=(replace(_EXPERTS, transposed=True),),
        stream={**_MIXTURE.stream, **_TRANSPOSED_EXPERTS},
    ),
    GPT2.name: Layout(
        attention=r"transformer\.h\.\d+\.attn",
        values="c_attn",
        output="c_proj",
        heads=_after_keys,
        inner=(replace(_TWO, transposed=True),),
        transposed=True,
        stream={r".*\.c_proj\.weight": 1, r".*\.(c_attn|c_fc)\.weight": 0, **_GPT2_STREAM},
    ),
    GPT_BIGCODE.name: Layout(
        attention=r"transformer\.h\.\d+\.attn",
        values="c_attn",
        output="c_proj",
        heads=_bigcode,
        inner=(_TWO,),
        stream={r".*\.c_proj\.weight": 0, r".*\.(c_attn|c_fc)\.weight": 1, **_GPT2_STREAM},
    ),
    GPT_NEOX.name: Layout(
        attention=r"gpt_neox\.layers\.\d+\.attention",
        values="query_key_value",
        output="dense",
        heads=_by_head,
        inner=(_NEOX_MLP,),
        stream=_NEOX_STREAM,
    ),
    FALCON.name: Layout(
        attention=r"transformer\.h\.\d+\.self_attention",
        values="query_key_value",
        output="dense",
        heads=_falcon,
        inner=(_NEOX_MLP,),
        stream=_NEOX_STREAM,
    ),
    OPT.name: Layout(
        attention=r"model\.decoder\.layers\.\d+\.self_attn",
        output="out_proj",
        heads=_own_matrix,
        inner=(Inner(prefix=r".+\.layers\.\d+", read="fc2", made=(("fc1", 0),)),),
        stream={
            r".*\.embed_(tokens|positions)\.weight|lm_head\.weight": 1,
            r".*\.project_out\.weight|.*\.(q|k|v)_proj\.weight|.*\.fc1\.weight": 1,
            r".*\.project_in\.weight|.*\.(out_proj|fc2)\.(weight|bias)|.*layer_norm\.(weight|bias)": 0,
            r".*\.(q|k|v)_proj\.bias|.*\.fc1\.bias": APART,
        },
        projected=(r".*\.project_in\.weight", r".*\.embed_tokens\.weight|lm_head\.weight"),
    ),
}  # fmt: skip
"""By the name of the family."""
