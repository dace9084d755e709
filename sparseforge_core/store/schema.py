"""The tables of the store and their constraints; the same on SQLite and PostgreSQL."""

from __future__ import annotations

import datetime

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

REVISIONS = ("0001", "0002", "0003")
"""Schema revisions that this code knows, oldest first; a new file in `migrations/versions` adds one."""

NAMES = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

metadata = sa.MetaData(naming_convention=NAMES)

JSON = sa.JSON().with_variant(JSONB(), "postgresql")


class UtcTime(sa.types.TypeDecorator[datetime.datetime]):
    """A moment, always with its time zone: SQLite forgets the zone, so it is UTC on the way in and out."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime.datetime | None, dialect: sa.Dialect) -> datetime.datetime | None:
        return None if value is None else value.astimezone(datetime.UTC)

    def process_result_value(self, value: datetime.datetime | None, dialect: sa.Dialect) -> datetime.datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=datetime.UTC) if value.tzinfo is None else value.astimezone(datetime.UTC)


recipe = sa.Table(
    "recipe",
    metadata,
    sa.Column("key", sa.String(12), primary_key=True),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("family", sa.Text, nullable=False),
    sa.Column("pattern", sa.Text, nullable=False),
    sa.Column("method", sa.Text, nullable=False),
    sa.Column("variant", sa.Text, nullable=False),
    sa.Column("tokens", sa.BigInteger, nullable=False),
    sa.Column("spec", sa.Text, nullable=False),
)

cell = sa.Table(
    "cell",
    metadata,
    sa.Column("key", sa.String(40), primary_key=True),
    sa.Column("recipe_key", sa.ForeignKey("recipe.key"), nullable=False),
    sa.Column("seed", sa.Integer, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("pool", sa.Text, nullable=False),
    sa.Column("cost_hours", sa.Float, nullable=False),
    sa.UniqueConstraint("recipe_key", "seed"),
)

requirement = sa.Table(
    "requirement",
    metadata,
    sa.Column("cell_key", sa.ForeignKey("cell.key"), primary_key=True),
    sa.Column("required_key", sa.String(40), primary_key=True),
)

grid = sa.Table(
    "grid",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("published", sa.Boolean, nullable=False),
    sa.Column("planned_at", UtcTime, nullable=False),
)

stage = sa.Table(
    "stage",
    metadata,
    sa.Column("grid", sa.ForeignKey("grid.name"), primary_key=True),
    sa.Column("cell_key", sa.ForeignKey("cell.key"), primary_key=True),
    sa.Column("stage", sa.Text, primary_key=True),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("variant", sa.Text, nullable=False, server_default=""),
)

suite = sa.Table(
    "suite",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("spec", sa.Text, nullable=False),
)

attempt = sa.Table(
    "attempt",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("cell_key", sa.ForeignKey("cell.key"), nullable=False),
    sa.Column("stage", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("started", UtcTime, nullable=False),
    sa.Column("heartbeat", UtcTime, nullable=False),
    sa.Column("finished", UtcTime),
    sa.Column("error", sa.Text, nullable=False),
    sa.Column("items_sha256", sa.Text),
    sa.Column("context", JSON),
    sa.Column("git_sha", sa.Text, nullable=False),
    sa.Column("dirty", sa.Boolean, nullable=False),
    sa.Column("lock_sha", sa.Text, nullable=False),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("device", sa.Text, nullable=False),
    sa.Column("python", sa.Text, nullable=False),
    sa.Column("torch", sa.Text, nullable=False),
    sa.Column("command", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("flow_run_id", sa.Text, nullable=False),
    sa.Column("diff_sha", sa.Text, nullable=False, server_default=""),
    sa.CheckConstraint("status IN ('running', 'done', 'failed', 'lost', 'interrupted')", name="status"),
)

LIVE = attempt.c.status.in_(("running", "done"))

one_live_attempt = sa.Index(
    "one_live_attempt",
    attempt.c.cell_key,
    attempt.c.stage,
    unique=True,
    sqlite_where=LIVE,
    postgresql_where=LIVE,
)
"""At most one attempt of a stage is running or done: a constraint of the database, not a convention."""

measurement = sa.Table(
    "measurement",
    metadata,
    sa.Column("cell_key", sa.ForeignKey("cell.key"), primary_key=True),
    sa.Column("stage", sa.Text, primary_key=True),
    sa.Column("metric", sa.Text, primary_key=True),
    sa.Column("value", sa.Float(53)),
    sa.Column("stderr", sa.Float(53)),
    sa.Column("n", sa.BigInteger, nullable=False),
    sa.Column("detail", JSON, nullable=False),
    sa.Column("attempt_id", sa.ForeignKey("attempt.id"), nullable=False),
)

outcome = sa.Table(
    "outcome",
    metadata,
    sa.Column("cell_key", sa.ForeignKey("cell.key"), primary_key=True),
    sa.Column("stage", sa.Text, primary_key=True),
    sa.Column("metric", sa.Text, primary_key=True),
    sa.Column("identity", sa.String(64), nullable=False),
    sa.Column("n", sa.BigInteger, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("attempt_id", sa.ForeignKey("attempt.id"), nullable=False),
)
"""What each item of a measurement gave, in the items' order: what paired tests need. `outcomes.py` says how packed."""

curve = sa.Table(
    "curve",
    metadata,
    sa.Column("cell_key", sa.ForeignKey("cell.key"), primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("attempt_id", sa.ForeignKey("attempt.id"), nullable=False),
)
"""What training showed of itself over its steps, thinned; `curves.py` says how."""

ledger = sa.Table(
    "ledger",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("attempt_id", sa.ForeignKey("attempt.id"), nullable=False, unique=True),
    sa.Column("previous", sa.String(64), nullable=False, unique=True),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
)
"""The results log: one entry a finished stage, each with the hash of the one before it."""

slot = sa.Table(
    "slot",
    metadata,
    sa.Column("grid", sa.ForeignKey("grid.name"), primary_key=True),
    sa.Column("exhibit", sa.Text, primary_key=True),
    sa.Column("row", sa.Text, primary_key=True),
    sa.Column("label", sa.Text, nullable=False),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("recipe_key", sa.ForeignKey("recipe.key")),
    sa.Column("seeds", JSON, nullable=False),
    sa.Column("suite_keys", JSON, nullable=False),
    sa.Column("note", sa.Text, nullable=False),
)

published = sa.Table(
    "published",
    metadata,
    sa.Column("exhibit", sa.Text, primary_key=True),
    sa.Column("row", sa.Text, primary_key=True),
    sa.Column("column", sa.Text, primary_key=True),
    sa.Column("value", sa.Float(53)),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("position", sa.Integer, nullable=False),
)
