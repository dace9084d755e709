"""What a grid calls a cell, kept with the grid's stages: grids may share a cell and call it by different names."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

KNOWN = (
    "UPDATE stage SET variant = (SELECT recipe.variant FROM recipe JOIN cell ON cell.recipe_key = recipe.key "
    "WHERE cell.key = stage.cell_key)"
)
"""The name that the last planned of them gave, until each is planned again."""


def upgrade() -> None:
    """Add the column and fill it with what is known."""
    op.add_column("stage", sa.Column("variant", sa.Text, nullable=False, server_default=""))
    op.execute(KNOWN)


def downgrade() -> None:
    """Take it away again."""
    op.drop_column("stage", "variant")
