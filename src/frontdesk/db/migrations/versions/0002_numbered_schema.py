"""The schema has a number, and names the oldest release that it serves."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("installation", sa.Column("schema", sa.Integer(), server_default="1", nullable=False))
    op.add_column("installation", sa.Column("serves_from", sa.Integer(), server_default="1", nullable=False))
