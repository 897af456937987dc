"""level and subject of the problem beside each answer, so that breakdowns come from stored answers alone"""

import sqlalchemy as sa
from alembic import op

revision = "0003_completion_labels"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("completions", sa.Column("level", sa.String(length=40), nullable=True))
    op.add_column("completions", sa.Column("subject", sa.String(length=200), nullable=True))


def downgrade() -> None:
    op.drop_column("completions", "subject")
    op.drop_column("completions", "level")
