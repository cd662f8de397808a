"""Records, and their measurements in long form.

Revision ID: 0001
Revises: nothing.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the tables of records and measurements."""
    op.create_table(
        "nervure_records",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("job_id", sa.String(20), nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("arm", sa.Text, nullable=False),
        sa.Column("case", sa.Text, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_index("nervure_records_job", "nervure_records", ["job_id"])
    op.create_index("nervure_records_target", "nervure_records", ["target"])
    done = sa.text("status = 'done'")
    op.create_index(
        "nervure_done_once", "nervure_records", ["job_id"], unique=True, sqlite_where=done, postgresql_where=done
    )
    op.create_table(
        "nervure_measurements",
        sa.Column("record_id", sa.Integer, sa.ForeignKey("nervure_records.id"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("arm", sa.Text, nullable=False),
        sa.Column("metric", sa.Text, nullable=False),
        sa.Column("value", sa.Double),
        sa.Column("step", sa.Double),
    )
