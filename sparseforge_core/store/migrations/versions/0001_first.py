"""First schema: recipes, cells, stages, attempts, measurements, suites, slots, published numbers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

JSON = sa.JSON().with_variant(JSONB(), "postgresql")
LIVE = sa.text("status IN ('running', 'done')")


def upgrade() -> None:
    """Create everything."""
    op.create_table(
        "recipe",
        sa.Column("key", sa.String(12), nullable=False),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("model", "family", "pattern", "method", "variant")),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_recipe"),
    )
    op.create_table(
        "cell",
        sa.Column("key", sa.String(40), nullable=False),
        sa.Column("recipe_key", sa.String(12), nullable=False),
        sa.Column("seed", sa.Integer, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("pool", sa.Text, nullable=False),
        sa.Column("cost_hours", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_cell"),
        sa.ForeignKeyConstraint(["recipe_key"], ["recipe.key"], name="fk_cell_recipe_key_recipe"),
        sa.UniqueConstraint("recipe_key", "seed", name="uq_cell_recipe_key"),
    )
    op.create_table(
        "requirement",
        sa.Column("cell_key", sa.String(40), nullable=False),
        sa.Column("required_key", sa.String(40), nullable=False),
        sa.PrimaryKeyConstraint("cell_key", "required_key", name="pk_requirement"),
        sa.ForeignKeyConstraint(["cell_key"], ["cell.key"], name="fk_requirement_cell_key_cell"),
    )
    op.create_table(
        "grid",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("published", sa.Boolean, nullable=False),
        sa.Column("planned_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_grid"),
    )
    op.create_table(
        "stage",
        sa.Column("grid", sa.Text, nullable=False),
        sa.Column("cell_key", sa.String(40), nullable=False),
        sa.Column("stage", sa.Text, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("grid", "cell_key", "stage", name="pk_stage"),
        sa.ForeignKeyConstraint(["grid"], ["grid.name"], name="fk_stage_grid_grid"),
        sa.ForeignKeyConstraint(["cell_key"], ["cell.key"], name="fk_stage_cell_key_cell"),
    )
    op.create_table(
        "suite",
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_suite"),
    )
    _results()


def _results() -> None:
    op.create_table(
        "attempt",
        sa.Column("id", sa.Integer, autoincrement=True, nullable=False),
        sa.Column("cell_key", sa.String(40), nullable=False),
        sa.Column("stage", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("started", sa.DateTime(timezone=True), nullable=False),
        sa.Column("heartbeat", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished", sa.DateTime(timezone=True)),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("items_sha256", sa.Text),
        sa.Column("context", JSON),
        sa.Column("git_sha", sa.Text, nullable=False),
        sa.Column("dirty", sa.Boolean, nullable=False),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("lock_sha", "host", "device", "python", "torch")),
        sa.Column("command", sa.Text, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("flow_run_id", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_attempt"),
        sa.ForeignKeyConstraint(["cell_key"], ["cell.key"], name="fk_attempt_cell_key_cell"),
        sa.CheckConstraint("status IN ('running', 'done', 'failed', 'lost', 'interrupted')", name="ck_attempt_status"),
    )
    op.create_index(
        "one_live_attempt", "attempt", ["cell_key", "stage"], unique=True, sqlite_where=LIVE, postgresql_where=LIVE
    )
    op.create_table(
        "measurement",
        sa.Column("cell_key", sa.String(40), nullable=False),
        sa.Column("stage", sa.Text, nullable=False),
        sa.Column("metric", sa.Text, nullable=False),
        sa.Column("value", sa.Float(53)),
        sa.Column("stderr", sa.Float(53)),
        sa.Column("n", sa.BigInteger, nullable=False),
        sa.Column("detail", JSON, nullable=False),
        sa.Column("attempt_id", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("cell_key", "stage", "metric", name="pk_measurement"),
        sa.ForeignKeyConstraint(["cell_key"], ["cell.key"], name="fk_measurement_cell_key_cell"),
        sa.ForeignKeyConstraint(["attempt_id"], ["attempt.id"], name="fk_measurement_attempt_id_attempt"),
    )
    op.create_table(
        "slot",
        *(sa.Column(name, sa.Text, nullable=False) for name in ("grid", "exhibit", "row", "label")),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("recipe_key", sa.String(12)),
        sa.Column("seeds", JSON, nullable=False),
        sa.Column("suite_keys", JSON, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("grid", "exhibit", "row", name="pk_slot"),
        sa.ForeignKeyConstraint(["grid"], ["grid.name"], name="fk_slot_grid_grid"),
        sa.ForeignKeyConstraint(["recipe_key"], ["recipe.key"], name="fk_slot_recipe_key_recipe"),
    )
    op.create_table(
        "published",
        *(sa.Column(name, sa.Text, nullable=False) for name in ("exhibit", "row", "column")),
        sa.Column("value", sa.Float(53)),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("exhibit", "row", "column", name="pk_published"),
    )


def downgrade() -> None:
    """Drop everything."""
    names = ("published", "slot", "measurement", "attempt", "suite", "stage", "grid", "requirement", "cell", "recipe")
    for name in names:
        op.drop_table(name)
