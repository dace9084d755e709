"""What the packed format holds and costs: resident bytes against dense, seconds to pack and to load.

python benchmarks/packed.py [--model smollm2-135m] [--dtype bfloat16] [--layers N] [--json]

The named shapes are filled with random weights, pruned 2:4 by magnitude, exported and loaded; bytes are those of the
tensors that the loaded model holds; the arithmetic on shapes alone stands beside them, and that of LLaMA-2-7B, of
which nothing is loaded. The peak is what a fresh process needs beyond its imports to load the export (VmHWM), packed
and dense. Seconds are of one run on this machine, the file read back from the page cache.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

from sparseforge_core.export.source import Exportable
from sparseforge_core.export.write import EXPORT_DTYPES, export
from sparseforge_core.models.families import family_of
from sparseforge_core.models.sites import assign_patterns, find_sites
from sparseforge_core.runtime.loading import load_packed
from sparseforge_core.runtime.manifest import WEIGHTS
from sparseforge_core.runtime.packed import Layout
from sparseforge_core.sparsity.patterns import nm, top_mask

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
    },
}
"""Configurations of LlamaForCausalLM."""

TWO_FOUR = nm(2, 4)


def arithmetic(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Bytes of a model of these shapes, dense and packed, from its parameters on meta."""
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPES[name]))
    sites = {site.name for site in find_sites(model, family_of("llama"))}
    layout = Layout(2, 4, transposed=False)
    dense = packed = 0
    for parameter, tensor in model.named_parameters():
        size = tensor.numel() * dtype.itemsize
        dense += size
        if parameter in sites:
            values, indices = layout.packed_shapes(tuple(tensor.shape))
            size = math.prod(values) * dtype.itemsize + math.prod(indices)
        packed += size
    return {"dense_bytes": dense, "packed_bytes": packed, "ratio": packed / dense}


def pruned(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """A random LLaMA of these shapes, 2:4 by magnitude."""
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**config), dtype=dtype).eval()
    for site in find_sites(model, family_of("llama")):
        weight = site.weight.data
        weight.copy_(torch.where(top_mask(weight.abs(), TWO_FOUR), weight, torch.zeros_like(weight)))
    return model


PEAK = """
import re, sys, pathlib
from sparseforge_core.runtime.loading import load_packed
import sparseforge_core.models.families, transformers.models.llama.modeling_llama
def held(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
before = held("VmRSS")
model, _ = load_packed(pathlib.Path(sys.argv[1]), dense=sys.argv[2] == "dense")
print(held("VmHWM") - before)
"""


def peak_bytes(folder: Path, how: str) -> int | None:
    """The most memory that loading takes at any time, in a process of its own; None where there is no /proc."""
    if not Path("/proc/self/status").is_file():
        return None
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", PEAK, str(folder), how]
    return int(subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Pack, write, load and count."""
    dtype = EXPORT_DTYPES[options.dtype]
    config = SHAPES[options.model] | ({"num_hidden_layers": options.layers} if options.layers else {})
    model = pruned(config, dtype)
    sites = assign_patterns(find_sites(model, family_of("llama")), TWO_FOUR)
    source = Exportable(options.model, model, {site.name: (site.pattern, site.transposed) for site in sites})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "packed"
        began = time.perf_counter()
        export(source, folder, form="packed")
        packed = time.perf_counter()
        file = (folder / WEIGHTS).stat().st_size
        loading = time.perf_counter()
        loaded: Any
        loaded, report = load_packed(folder)
        seconds = time.perf_counter() - loading
        ids = torch.arange(16).reshape(1, -1)
        peaks = {how: peak_bytes(folder, how) for how in ("packed", "dense")}
        same = torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    return {
        "model": options.model,
        "layers": config["num_hidden_layers"],
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sites": len(sites),
        "file_bytes": file,
        "resident_bytes": report.resident_bytes,
        "dense_bytes": report.dense_bytes,
        "ratio": report.resident_bytes / report.dense_bytes,
        "peak_bytes": peaks,
        "pack_seconds": packed - began,
        "load_seconds": seconds,
        "same_logits": same,
        "arithmetic": {name: arithmetic(name, dtype) for name in SHAPES},
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; exit code 1 if the loaded model does not answer as the exported one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=sorted(SHAPES), default="smollm2-135m", help="shapes to fill and measure")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--dtype", choices=sorted(EXPORT_DTYPES), default="bfloat16", help="type of the values")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    found = measure(options)
    if options.json:
        print(json.dumps(found))
    else:
        print(f"{found['model']}, {found['layers']} layers, {found['dtype']}, torch {found['torch']}")
        print(f"resident {found['resident_bytes']:,} of {found['dense_bytes']:,} bytes: {found['ratio']:.4f}")
        peaks = ", ".join(f"{how} {size:,}" for how, size in found["peak_bytes"].items() if size is not None)
        print(f"peak bytes while loading, beyond the imports: {peaks or 'not known here'}")
        print(f"packed and written in {found['pack_seconds']:.2f} s, loaded in {found['load_seconds']:.2f} s")
        print(f"logits of the loaded model: {'the same bits' if found['same_logits'] else 'OTHERS'}")
        for name, row in found["arithmetic"].items():
            print(f"by arithmetic, {name}: {row['packed_bytes']:,} of {row['dense_bytes']:,}: {row['ratio']:.4f}")
    return 0 if found["same_logits"] else 1


if __name__ == "__main__":
    sys.exit(main())
