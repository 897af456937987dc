"""columns of runs and checkpoints; trace blobs that PostgreSQL can read by range"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("runs", sa.Column("project", sa.String(length=200), nullable=True))
    op.add_column("runs", sa.Column("notes", sa.Text(), nullable=True))
    op.add_column("runs", sa.Column("origin", sa.String(length=20), nullable=False, server_default="job"))
    op.add_column("runs", sa.Column("init_from", sa.String(length=40), nullable=True))
    op.add_column("checkpoints", sa.Column("pinned", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("checkpoints", sa.Column("alias", sa.String(length=200), nullable=True))
    if op.get_bind().dialect.name == "postgresql":
        # Stored out of line and not compressed again: substr() then fetches only the chunks of its range.
        op.execute("ALTER TABLE trace_blobs ALTER COLUMN data SET STORAGE EXTERNAL")


def downgrade() -> None:
    for column in ("alias", "pinned"):
        op.drop_column("checkpoints", column)
    for column in ("init_from", "origin", "notes", "project"):
        op.drop_column("runs", column)
