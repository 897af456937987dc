"""what a worker's jobs may use"""

import sqlalchemy as sa
from alembic import op

from service.db.types import Json

revision = "0005_worker_abilities"
down_revision = "0004_several_runs"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workers", sa.Column("abilities", Json, nullable=True))


def downgrade() -> None:
    op.drop_column("workers", "abilities")
