"""Outcomes of single items, curves of training, the hash-chained results log, and the hash of a dirty checkout."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add three tables and a column; `migrate.upgrade` then enters the finished stages of an older store in the log."""
    op.add_column("attempt", sa.Column("diff_sha", sa.Text, nullable=False, server_default=""))
    op.create_table(
        "outcome",
        sa.Column("cell_key", sa.String(40), nullable=False),
        sa.Column("stage", sa.Text, nullable=False),
        sa.Column("metric", sa.Text, nullable=False),
        sa.Column("identity", sa.String(64), nullable=False),
        sa.Column("n", sa.BigInteger, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("attempt_id", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("cell_key", "stage", "metric", name="pk_outcome"),
        sa.ForeignKeyConstraint(["cell_key"], ["cell.key"], name="fk_outcome_cell_key_cell"),
        sa.ForeignKeyConstraint(["attempt_id"], ["attempt.id"], name="fk_outcome_attempt_id_attempt"),
    )
    op.create_table(
        "curve",
        sa.Column("cell_key", sa.String(40), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("attempt_id", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("cell_key", "name", name="pk_curve"),
        sa.ForeignKeyConstraint(["cell_key"], ["cell.key"], name="fk_curve_cell_key_cell"),
        sa.ForeignKeyConstraint(["attempt_id"], ["attempt.id"], name="fk_curve_attempt_id_attempt"),
    )
    op.create_table(
        "ledger",
        sa.Column("id", sa.Integer, autoincrement=True, nullable=False),
        sa.Column("attempt_id", sa.Integer, nullable=False),
        sa.Column("previous", sa.String(64), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_ledger"),
        sa.ForeignKeyConstraint(["attempt_id"], ["attempt.id"], name="fk_ledger_attempt_id_attempt"),
        sa.UniqueConstraint("attempt_id", name="uq_ledger_attempt_id"),
        sa.UniqueConstraint("previous", name="uq_ledger_previous"),
    )


def downgrade() -> None:
    """Take them away again."""
    for name in ("ledger", "curve", "outcome"):
        op.drop_table(name)
    op.drop_column("attempt", "diff_sha")
