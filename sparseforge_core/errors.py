"""Every error the product raises on purpose: what was asked, what was found, what to do."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

NETWORK = {"ConnectionError", "TimeoutError", "Timeout", "TransportError", "MaxRetryError"}
"""Classes, or bases of them, by which Python's, requests', httpx's, urllib3's errors of a network go."""
DISK = {errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.ESTALE, errno.EROFS}


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


class NotFinite(CurvatureUnavailable, Diverged):
    """A statistic, curvature or score is NaN or infinite: what it was computed from has diverged."""


class NotCompilable(SparseForgeError):
    """The compiler takes every few steps for something new; uncompiled the cell will run."""


class OutOfMemory(SparseForgeError):
    """The host or the device had no memory left; less at once may still fit."""


class DoesNotFit(OutOfMemory):
    """Nothing smaller is left to try: the cell does not fit into this machine."""


class FolderHeld(SparseForgeError):
    """Another process is still writing in the folder of a stage."""


class Unavailable(SparseForgeError):
    """A network or a disk does not answer for now."""


class RecipeDrift(SparseForgeError):
    """The store or a file holds another recipe under the same key."""


class CheckpointMismatch(SparseForgeError):
    """A checkpoint of another cell, or one that is truncated or altered."""


class ExportError(SparseForgeError):
    """An export that cannot be made as asked, or one of an unknown format, truncated or altered."""


class BundleError(SparseForgeError):
    """A bundle, or what came of one, that is foreign, altered, incomplete or of another format version."""


class CellsFailed(SparseForgeError):
    """Cells of a bundle failed; the others went on."""


class CellTaken(SparseForgeError):
    """Another live attempt holds this stage of the cell."""


class RanksDisagree(SparseForgeError):
    """Processes that were to train one cell together and cannot: other cells, too few devices, folders not shared."""


class DataError(SparseForgeError):
    """A corpus, tokenizer or benchmark that cannot be read or does not fit the model."""


class StoreError(SparseForgeError):
    """The results database is unreachable, locked, read-only, foreign, or of a newer schema."""


class IncompleteExhibit(SparseForgeError):
    """A table or figure that was asked for in strict mode and lacks results."""


class Interrupted(SparseForgeError):
    """The process was asked to stop; the work so far is in a checkpoint."""


def described(error: BaseException) -> str:
    """An error as one text, `<class>: <message>`: what the store keeps, and tells its cause from (`store/causes.py`).

    A subclass from another room goes by the nearest class of this file; one that was raised because a network or a disk
    was away goes by `Unavailable`, whatever was being read.
    """
    ours = (cls for cls in type(error).__mro__ if cls.__module__ == __name__ and cls is not SparseForgeError)
    kind = next(ours, type(error))
    if issubclass(kind, SparseForgeError) and error.__cause__ is not None and _is_away(error.__cause__):
        kind = Unavailable
    return f"{kind.__name__}: {error}"


def _is_away(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that a network or a disk does not answer for now."""
    while error is not None:
        names = {cls.__name__ for cls in type(error).__mro__}
        if "OfflineModeIsEnabled" in names:  # the user's wish, which no waiting changes
            return False
        if names & NETWORK or (isinstance(error, OSError) and error.errno in DISK):
            return True
        error = error.__cause__ or error.__context__
    return False


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """The sentence for a name that is not in a registry, suggesting the nearest one."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(names) or 'none'}."
