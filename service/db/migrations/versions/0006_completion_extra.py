"""what reward functions say of an answer; columns of checkpoints that nothing used"""

import sqlalchemy as sa
from alembic import op

from service.db.types import Json

revision = "0006_completion_extra"
down_revision = "0005_worker_abilities"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("completions", sa.Column("extra", Json, nullable=True))
    for column in ("alias", "pinned"):
        op.drop_column("checkpoints", column)


def downgrade() -> None:
    op.add_column("checkpoints", sa.Column("pinned", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("checkpoints", sa.Column("alias", sa.String(length=200), nullable=True))
    op.drop_column("completions", "extra")
