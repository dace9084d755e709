"""Folders that `save_pretrained` wrote: a model's shell without its weights, its tokenizer, and the files about it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import torch
import transformers

from sparseforge_core.errors import DataError, UnsupportedModel
from sparseforge_core.models import hub

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def shell(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder's configuration: parameters without memory (on meta), buffers computed.

    Raises UnsupportedModel if the configuration is not of a known model; code in the folder never runs.
    """
    try:
        configuration, _ = hub.classes_for({"pretrained_model_name_or_path": str(folder)})
        config = hub.prepared(configuration.from_pretrained(str(folder)))
        with accelerate.init_empty_weights(include_buffers=False):
            ours = config.model_type in hub.OURS  # whose buffers would be cast with its parameters
            model = hub.from_config(config, dtype=torch.float32 if ours else dtype)
        model.tie_weights()  # moving to meta undid it
        if (folder / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
    except (OSError, ValueError, ImportError) as error:
        raise UnsupportedModel(f"the configuration in {folder} makes no model: {hub.first_line(error)}") from error
    return model


def tokenizer_in(folder: Path) -> PreTrainedTokenizerFast | None:
    """The folder's tokenizer, or None where it has none. Raises DataError if it cannot be read."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(f"the tokenizer in {folder} cannot be loaded: {hub.first_line(error)}") from error
    return tokenizer  # type: ignore[no-any-return]


def save_about(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a model's configuration, and how it generates, beside weights of this type."""
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def is_plain_linear(module: Any) -> bool:
    """Whether a module is exactly a Linear or a Conv1D: y = x W + b and nothing else."""
    return type(module) in (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
