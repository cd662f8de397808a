"""Papers that feeds told of, what was mailed of them, subscriptions, and the state of each feed.

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Create the four tables."""
    op.create_table(
        "nervure_papers",
        sa.Column("id", sa.String(80), primary_key=True),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("link", sa.Text, nullable=False),
        sa.Column("summary", sa.Text, nullable=False),
        sa.Column("published", sa.Text, nullable=False),
        sa.Column("votes", sa.Integer),
        sa.Column("family", sa.Text, nullable=False),
        sa.Column("score", sa.Double, nullable=False),
        sa.Column("first_seen", sa.String(20), nullable=False),
    )
    op.create_index("nervure_papers_score", "nervure_papers", ["score"])
    op.create_table(
        "nervure_mailings",
        sa.Column("address", sa.Text, primary_key=True),
        sa.Column("paper_id", sa.String(80), sa.ForeignKey("nervure_papers.id"), primary_key=True),
        sa.Column("mailed", sa.String(20), nullable=False),
    )
    op.create_table(
        "nervure_subscriptions",
        sa.Column("query", sa.Text, primary_key=True),
        sa.Column("since", sa.String(20), nullable=False),
    )
    op.create_table(
        "nervure_feeds",
        sa.Column("url", sa.Text, primary_key=True),
        sa.Column("etag", sa.Text, nullable=False),
        sa.Column("last_modified", sa.Text, nullable=False),
        sa.Column("fetched", sa.Double, nullable=False),
        sa.Column("next_try", sa.Double, nullable=False),
    )
