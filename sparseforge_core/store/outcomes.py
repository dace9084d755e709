"""Per-item outcomes: from the lines of an items file to the store and back.

A question is one byte (0 wrong, 1 right, 255 without an answer), anything else eight (a little-endian double, NaN
without an answer); both are compressed. The store keeps them so that tests pair items without anybody's files.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from sparseforge_core.store.rows import Outcomes

ANSWERS = ("acc", "acc_norm")
"""Fields of a question's line that say whether the answer was right."""
WINDOW = "nll"
"""Field of a window's line: nats per predicted token."""
SMALL, LARGE = b"b", b"d"
NONE = 255


def outcomes_of(items: Iterable[Mapping[str, Any]]) -> list[Outcomes]:
    """The outcomes of the lines of an items file, by metric; lines of other kinds carry none."""
    identities: dict[str, list[Any]] = {}
    values: dict[str, list[float | None]] = {}
    for item in items:
        for metric, identity, value in _parts(item):
            identities.setdefault(metric, []).append(identity)
            values.setdefault(metric, []).append(value)
    return [
        Outcomes(metric=metric, identity=_hash(identities[metric]), values=tuple(found))
        for metric, found in values.items()
    ]


def _parts(item: Mapping[str, Any]) -> list[tuple[str, Any, float | None]]:
    """(metric, what the item is, what it gave) of one line."""
    if "task" in item:
        task = item["task"]
        identity = [task, item.get("split"), item.get("doc_id"), item.get("doc_hash")]
        return [(f"{task}/{name}", identity, item[name]) for name in ANSWERS if name in item]
    if "window" in item and WINDOW in item:
        return [(WINDOW, item["window"], item[WINDOW])]
    return []


def _hash(identities: list[Any]) -> str:
    return hashlib.sha256(json.dumps(identities, separators=(",", ":")).encode()).hexdigest()


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the outcomes; None if there are none or one has no answer."""
    known = list(values)
    if not known or any(value is None for value in known):
        return None
    return math.fsum(value for value in known if value is not None) / len(known)


def outcome_row(outcome: Outcomes) -> dict[str, Any]:
    """The columns that are the outcomes' own."""
    values = outcome.values
    return {"metric": outcome.metric, "identity": outcome.identity, "n": len(values), "body": pack(values)}


def pack(values: Iterable[float | None]) -> bytes:
    """Outcomes as compressed bytes."""
    known = list(values)
    if all(value in (0, 1, None) for value in known):
        return SMALL + zlib.compress(bytes(NONE if value is None else int(value) for value in known))
    numbers = (math.nan if value is None else float(value) for value in known)
    return LARGE + zlib.compress(struct.pack(f"<{len(known)}d", *numbers))


def unpack(body: bytes) -> tuple[float | None, ...]:
    """What `pack` was given. Raises ValueError for bytes that it did not make."""
    kind, data = expand(body)
    if kind == SMALL:
        return tuple(None if value == NONE else float(value) for value in data)
    numbers = struct.unpack(f"<{len(data) // 8}d", data)
    return tuple(None if math.isnan(value) else value for value in numbers)


def expand(body: bytes) -> tuple[bytes, bytes]:
    """(SMALL or LARGE, the outcomes as one or eight bytes each). Raises ValueError for bytes that nobody packed."""
    kind = body[:1]
    try:
        data = zlib.decompress(body[1:])
    except zlib.error as error:
        raise ValueError(f"these bytes are no packed outcomes ({error})") from error
    if kind not in (SMALL, LARGE) or (kind == LARGE and len(data) % 8):
        raise ValueError("these bytes are no packed outcomes")
    return kind, data
