"""The model card of an export: a function of its manifest alone, so that the same export has the same card."""

from __future__ import annotations

import json
from typing import Any

from sparseforge_core.runtime.manifest import PACKED, Manifest
from sparseforge_core.runtime.packed import Layout

TWO_FOUR = Layout(2, 4, transposed=False)

LOADS = {
    PACKED: "This project's runtime only: `sparseforge_core.runtime.load_sparse(folder)`, `sparseforge generate`. "
    "`docs/packed-format.md` describes the files for other readers.",
    "": "Plain transformers (`AutoModelForCausalLM.from_pretrained(folder)`), as the dense model that it also is.",
}
"""Who can load an export, by its format."""

ELSEWHERE = (
    "No public engine gains speed from these zeros today: vLLM raises an error for 2:4 models since 0.19.1, "
    "compressed-tensors dropped the format in 0.15 and transformers followed, TensorRT-LLM still has its flag, from "
    "which users measure no gain (Model-Optimizer issue 1974), and plain transformers computes with a dense weight."
)

FAST_HERE = (
    "This project's runtime does, on NVIDIA GPUs of compute capability 9.0 (H100, H200): `load_sparse(folder, "
    'device="cuda")`, `sparseforge generate`, `sparseforge serve`; `sparseforge doctor --model .` says what to expect '
    "of this model on that machine. On a CPU it is a reference: it saves memory, not time."
)

SLOW_HERE = (
    "This project's kernels multiply {wanted}, so that the runtime loads this export as its reference does: it saves "
    "memory, not time."
)


def card(manifest: Manifest) -> str:
    """README.md of an export."""
    about = manifest.about
    parts = [
        f"---\nlibrary_name: transformers\ntags: [sparse, {json.dumps(about.get('pattern') or 'dense')}]\n---",
        f"# {about.get('source', 'A model')}, {about.get('pattern') or 'dense'}",
        f"Format `{manifest.format}`, values {about.get('dtype')}. Check the files with `sparseforge verify-export .`, "
        "or `sha256sum -c SHA256SUMS`.",
        "## Who loads it, and who runs it fast\n\n"
        + LOADS.get(manifest.format, LOADS[""])
        + f"\n\n{ELSEWHERE} {_here(manifest)}".rstrip(),
        *_branches(about),
        *_coverage(about),
        *_measurements(about),
        *_provenance(about),
    ]
    return "\n\n".join(parts) + "\n"


def _here(manifest: Manifest) -> str:
    """What our own runtime makes of it."""
    if manifest.format != PACKED:
        return "Export it as packed for this project's runtime."
    packed = [entry for entry in manifest.tensors.values() if entry.layout is not None]
    taken = [e for e in packed if e.layout == TWO_FOUR and e.dtype in ("BF16", "F16") and len(e.shape) == 2]
    if packed and len(taken) == len(packed):
        return FAST_HERE
    return SLOW_HERE.format(wanted="2:4 matrices [out, in] of bfloat16 or float16")


def _branches(about: Any) -> list[str]:
    if not about.get("branches"):
        return []
    return [
        f"## Side branch\n\n{len(about['branches'])} weights have a side branch (SLoRB, B P) in `slorb.safetensors`. "
        "It stays apart, because added in it would fill the zeros. `load_sparse` computes with W + B P; "
        "**plain transformers ignores it and computes another model.**"
    ]


def _coverage(about: Any) -> list[str]:
    cover = about.get("coverage")
    if not cover:
        return []
    masked, dense = sum(cover["included"].values()), sum(cover["excluded"].values())
    rows = [f"| {name} | {about['pattern']} | {count:,} |" for name, count in cover["included"].items()]
    rows += [f"| {name} | dense | {count:,} |" for name, count in cover["excluded"].items()]
    title = f"{masked:,} of {masked + dense:,} parameters are sparse ({masked / (masked + dense):.1%}), family "
    return ["## Coverage\n\n" + title + f"{cover['family']}.\n\n| part | pattern | parameters |\n|---|---|---|\n"
            + "\n".join(rows)]  # fmt: skip


def _measurements(about: Any) -> list[str]:
    rows = about.get("measurements")
    if not rows:
        return ["## Measurements\n\nNone came with the model."]
    lines = []
    for row in rows:
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.3g}"
        lines.append(f"| {row['suite']} | {row['metric']} | {_number(row['value'])}{error} | {row['n']:,} |")
    note = "Measured on the float32 weights of the cell before the export, side branch included.\n\n"
    return ["## Measurements\n\n" + note + "| suite | metric | value | n |\n|---|---|---|---|\n" + "\n".join(lines)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() else f"{value:.6g}"


def _provenance(about: Any) -> list[str]:
    lines = [f"- {name}: `{about[key]}`" for name, key in (
        ("cell", "cell"), ("seed", "seed"), ("source", "source"), ("exported by commit", "git_commit"),
    ) if about.get(key) not in (None, "")]  # fmt: skip
    if about.get("negative_zeros_dropped"):
        lines.append(f"- {sum(about['negative_zeros_dropped'].values()):,} pruned weights were -0.0 and became +0.0")
    text = "## Provenance\n\n" + ("\n".join(lines) or "Unknown.")
    if about.get("recipe"):
        recipe = json.dumps(about["recipe"], indent=1, sort_keys=True)
        text += f"\n\n## Recipe\n\n```json\n{recipe}\n```"
    return [text]
