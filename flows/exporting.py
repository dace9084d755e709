"""What `export`, `verify-export` and `generate` do, as text for the command line to print."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

from flows.home import Home
from flows.provenance import provenance
from sparseforge_core import files
from sparseforge_core.errors import RecipeError
from sparseforge_core.sparsity.patterns import BLOCK_16, GroupPattern, nm


def export_to(options: argparse.Namespace, home: Home) -> tuple[dict[str, Any], str]:
    """Write an export; (where it is and what it holds, the same as a sentence)."""
    from sparseforge_core.export.source import open_any
    from sparseforge_core.export.write import check_request, export

    check_request(options.format, options.dtype)
    pattern = None if options.pattern is None else pattern_named(options.pattern)
    source = open_any(options.source, home.root, pattern)
    name = source.about.get("cell") or Path(options.source).resolve().name
    out = options.out or files.inside(home.root / "exports", f"{name}-{options.format}", "cell")
    code = provenance()
    commit = f"{code.git_sha}-dirty" if code.dirty else code.git_sha
    manifest = export(source, out, form=options.format, dtype=options.dtype, commit=commit)
    size = sum(file.stat().st_size for file in out.iterdir())
    sites = len(manifest.about["sites"])
    found = {"folder": str(out), "format": manifest.format, "sites": sites, "bytes": size}
    return found, f"{out}: {manifest.format}, {sites} sparse weights, {size:,} bytes"


def verification(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Check an export; (what it holds, the same as a sentence)."""
    from sparseforge_core.export.verify import verify_export

    found = verify_export(options.folder)
    return dataclasses.asdict(found), (
        f"{options.folder}: intact {found.format}, {found.tensors} tensors, {found.sites} sparse weights, "
        f"{found.groups:,} groups, {found.bytes:,} bytes"
    )


def generation(options: argparse.Namespace) -> tuple[dict[str, Any], str, str]:
    """Continue a prompt: (all of it, the continuation, how it was made)."""
    from sparseforge_core.runtime.generate import check_request, say
    from sparseforge_core.runtime.speech import Voice

    check_request(options.tokens, options.temperature)
    given = {"device": options.device, "dense": options.dense, "cache": options.cache, "mode": options.mode}
    voice = Voice.load(options.folder, **given)
    made = say(
        voice.speaker,
        voice.tokenizer,
        options.prompt,
        tokens=options.tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
    notes = f"{voice}; {len(made.tokens)} tokens in {made.seconds:.2f} s"
    return {**dataclasses.asdict(made), "load": dataclasses.asdict(voice.report)}, made.text, notes


def pattern_named(text: str) -> GroupPattern:
    """The pattern that people call 2:4, N:M or block-16. Raises RecipeError for another text."""
    if text == BLOCK_16.name:
        return BLOCK_16
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise RecipeError(f"--pattern {text}: give N:M, for instance 2:4, or {BLOCK_16.name}")
    return nm(int(match.group(1)), int(match.group(2)))
