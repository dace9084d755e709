"""Every error the product raises on purpose: what was asked, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparseForgeError(Exception):
    """Base of all errors whose message is meant for a person; the command line prints it without a traceback."""


class RecipeError(SparseForgeError):
    """A recipe, cell, grid or field of one that cannot be executed as written."""


class UnsupportedModel(SparseForgeError):
    """A model that no family declares, or whose weights the family's rules do not account for."""


class PatternViolation(SparseForgeError):
    """A weight that does not fit the sparsity pattern, by shape or by the entries it keeps."""


class CurvatureUnavailable(SparseForgeError):
    """A statistic that a criterion needs was not observed for some site, or is not finite."""


class Diverged(SparseForgeError):
    """A loss or gradient stopped being finite; nothing of that step was kept."""


class RecipeDrift(SparseForgeError):
    """The store or a file holds another recipe under the same key."""


class CheckpointMismatch(SparseForgeError):
    """A checkpoint of another cell, or one that is truncated or altered."""


class ExportError(SparseForgeError):
    """An export that cannot be made as asked, or one of an unknown format, truncated or altered."""


class BundleError(SparseForgeError):
    """A bundle, or what came of one, that is foreign, altered, incomplete or of another format version."""


class CellTaken(SparseForgeError):
    """Another live attempt holds this stage of the cell."""


class DataError(SparseForgeError):
    """A corpus, tokenizer or benchmark that cannot be read or does not fit the model."""


class StoreError(SparseForgeError):
    """The results database is unreachable, locked, read-only, foreign, or of a newer schema."""


class IncompleteExhibit(SparseForgeError):
    """A table or figure that was asked for in strict mode and lacks results."""


class Interrupted(SparseForgeError):
    """The process was asked to stop; the work so far is in a checkpoint."""


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """The sentence for a name that is not in a registry, suggesting the nearest one."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(names) or 'none'}."
