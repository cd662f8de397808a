"""Leases on the jobs in flight.

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the table of leases."""
    op.create_table(
        "nervure_leases",
        sa.Column("job_id", sa.String(20), primary_key=True),
        sa.Column("owner", sa.String(32), nullable=False),
        sa.Column("machine", sa.Text, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("born", sa.Text, nullable=False),
        sa.Column("renewed", sa.Double, nullable=False),
    )
    op.create_index("nervure_leases_owner", "nervure_leases", ["owner"])
