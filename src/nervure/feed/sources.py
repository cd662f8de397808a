"""The feeds that are read when the user names none."""

from __future__ import annotations

SOURCES = (
    "https://export.arxiv.org/api/query?search_query=cat:cs.LG&sortBy=submittedDate&sortOrder=descending&max_results=100",
    "https://huggingface.co/api/daily_papers?limit=100",
)
