"""Floor 7: tables, plots and HTML from records."""

from nervure.report.audit_page import audit_files
from nervure.report.export import board_parts, environment_of, leaderboard_files, verdict_files, verdict_parts
from nervure.report.tables import ArmRow, Board, CaseTable, arm_rows, case_tables, contest_tables, no_faster

__all__ = [
    "ArmRow",
    "Board",
    "CaseTable",
    "arm_rows",
    "audit_files",
    "board_parts",
    "case_tables",
    "contest_tables",
    "environment_of",
    "leaderboard_files",
    "no_faster",
    "verdict_files",
    "verdict_parts",
]
