"""The results log: each finished stage is one entry, and each entry holds the hash of the one before it.

An entry spells out what was recorded: measurements, hashes of outcomes and curves, the hash of the items file, who
measured with what. A number that is changed, added or taken away later contradicts its entry; an entry that is
changed, moved or taken away breaks the chain behind it. Whoever keeps the last hash elsewhere can also prove that
nobody rewrote the whole log.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from sparseforge_core.store import schema

FIRST = "0" * 64
"""What stands for the entry before the first."""
ORIGIN = (
    "git_sha", "dirty", "diff_sha", "lock_sha", "host", "device", "python", "torch", "command", "pid", "flow_run_id",
)  # fmt: skip
NUMBERS = ("value", "stderr", "n")


@dataclass(frozen=True)
class Break:
    """One contradiction; `about` is the (cell key, stage) that it concerns, or empty for the chain itself."""

    about: tuple[str, str] | tuple[()]
    sentence: str


def append(connection: sa.Connection, attempt_id: int) -> str:
    """Enter what the store now holds of a finished attempt; returns the entry's hash."""
    table = schema.ledger
    if connection.dialect.name == "postgresql":
        # Two writers must not continue the same entry; SQLite's write lock sees to that by itself.
        connection.execute(sa.text("LOCK TABLE ledger IN SHARE ROW EXCLUSIVE MODE"))
    last = connection.execute(sa.select(table.c.digest).order_by(table.c.id.desc()).limit(1)).scalar()
    previous = last or FIRST
    body = canonical(_recorded(connection, [attempt_id])[attempt_id])
    digest = link(previous, body)
    connection.execute(sa.insert(table).values(attempt_id=attempt_id, previous=previous, digest=digest, body=body))
    return digest


def adopt(connection: sa.Connection) -> int:
    """Enter every finished attempt of a store that was written before there was a log; returns how many."""
    attempt = schema.attempt
    done = sa.select(attempt.c.id).where(attempt.c.status == "done").order_by(attempt.c.id)
    bodies = _recorded(connection, list(connection.execute(done).scalars()))
    previous, rows = FIRST, []
    for number, found in bodies.items():
        body = canonical(found)
        digest = link(previous, body)
        rows.append({"attempt_id": number, "previous": previous, "digest": digest, "body": body})
        previous = digest
    if rows:
        connection.execute(sa.insert(schema.ledger), rows)
    return len(rows)


def link(previous: str, body: str) -> str:
    """The hash of an entry."""
    return hashlib.sha256(f"{previous}\n{body}".encode()).hexdigest()


def canonical(body: Any) -> str:
    """One text for one meaning: PostgreSQL gives 1.0 back as it was but 1e22 as an integer."""
    return json.dumps(_plain(body), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(body: Any) -> Any:
    if isinstance(body, dict):
        return {str(key): _plain(value) for key, value in body.items()}
    if isinstance(body, (list, tuple)):
        return [_plain(value) for value in body]
    if isinstance(body, float) and body.is_integer():
        return int(body)
    return body


def breaks(connection: sa.Connection) -> list[Break]:
    """Every contradiction between the log and itself, and between the log and the store's tables."""
    table, attempt = schema.ledger, schema.attempt
    entries = connection.execute(sa.select(table).order_by(table.c.id)).all()
    done = connection.execute(sa.select(attempt.c.id).where(attempt.c.status == "done").order_by(attempt.c.id))
    recorded = _recorded(connection, list(done.scalars()))
    found = [*_chain(entries), *_changes(entries, recorded)]
    logged = {entry.attempt_id for entry in entries}
    for number, now in recorded.items():
        if number not in logged:
            sentence = f"stage {now['stage']} of cell {now['cell']} is done and has no entry in the results log"
            found.append(Break((now["cell"], now["stage"]), f"{sentence}: the entry was taken out, or it never was in"))
    return found


def _chain(entries: Any) -> Iterator[Break]:
    previous = FIRST
    for entry in entries:
        about = _about(entry)
        where = f"entry {entry.id} of the results log" + (f" (cell {about[0]}, stage {about[1]})" if about else "")
        if entry.previous != previous:
            yield Break(about, f"{where} does not follow the entry before it: one was taken out, moved or changed")
        if link(entry.previous, entry.body) != entry.digest:
            yield Break(about, f"{where} was altered: its text does not give its hash")
        previous = entry.digest


def _about(entry: Any) -> tuple[str, str] | tuple[()]:
    try:
        body = json.loads(entry.body)
        return str(body["cell"]), str(body["stage"])
    except (ValueError, KeyError, TypeError):
        return ()


def _changes(entries: Any, recorded: dict[int, dict[str, Any]]) -> Iterator[Break]:
    for entry in entries:
        about = _about(entry)
        if not about:
            continue  # the chain has said so
        now = recorded.get(entry.attempt_id)
        if now is None:
            yield Break(about, f"stage {about[1]} of cell {about[0]} is in the results log and no longer done")
            continue
        for what in _differences(json.loads(entry.body), json.loads(canonical(now))):
            yield Break(about, f"{what} of stage {about[1]} of cell {about[0]}")


def _differences(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What differs between an entry and the store, down to the metric and the part of it."""
    for part, one in (("measurements", "measurement"), ("outcomes", "outcomes"), ("curves", "curve")):
        for name in sorted({*then.get(part, {}), *now.get(part, {})}):
            old, new = then.get(part, {}).get(name), now.get(part, {}).get(name)
            if old != new:
                yield f"{one} {name}: the log says {_short(old)}, the store {_short(new)}: the value"
    for name in sorted({*then, *now} - {"measurements", "outcomes", "curves"}):
        if then.get(name) != now.get(name):
            yield f"{name}: the log says {_short(then.get(name))}, the store {_short(now.get(name))}: the record"


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, sort_keys=True)
    return text if len(text) <= 160 else f"{text[:157]}..."


def _recorded(connection: sa.Connection, attempts: list[int]) -> dict[int, dict[str, Any]]:
    """What the store holds of finished attempts, by attempt id and in the order asked for."""
    table = schema.attempt
    one = attempts[0] if len(attempts) == 1 else None

    def rows(of: sa.Table, key: str = "attempt_id") -> Any:
        chosen = sa.select(of)
        return connection.execute(chosen.where(of.c[key] == one) if one is not None else chosen)

    found: dict[int, dict[str, Any]] = {}
    by_id = {row.id: row for row in rows(table, "id")}
    for number in attempts:
        row = by_id[number]
        found[number] = {
            "attempt": number,
            "cell": row.cell_key,
            "stage": row.stage,
            "finished": None if row.finished is None else row.finished.isoformat(),
            "items_sha256": row.items_sha256,
            "context": row.context,
            "origin": {name: getattr(row, name) for name in ORIGIN},
            "measurements": {},
            "outcomes": {},
            "curves": {},
        }
    for row in rows(schema.measurement):
        if row.attempt_id in found:
            values = {name: getattr(row, name) for name in NUMBERS}
            found[row.attempt_id]["measurements"][row.metric] = {**values, "detail": row.detail}
    for row in rows(schema.outcome):
        if row.attempt_id in found:
            digest = hashlib.sha256(row.body).hexdigest()
            found[row.attempt_id]["outcomes"][row.metric] = {"items": row.identity, "n": row.n, "sha256": digest}
    for row in rows(schema.curve):
        if row.attempt_id in found:
            found[row.attempt_id]["curves"][row.name] = hashlib.sha256(row.body.encode()).hexdigest()
    return found
