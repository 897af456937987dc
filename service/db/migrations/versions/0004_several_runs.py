"""jobs that have several runs: an evaluation of several checkpoints"""

import sqlalchemy as sa
from alembic import op

from service.db.types import Json

revision = "0004_several_runs"
down_revision = "0003_completion_labels"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("more_run_ids", Json, server_default="[]", nullable=False))


def downgrade() -> None:
    op.drop_column("jobs", "more_run_ids")
