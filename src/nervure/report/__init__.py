"""Floor 7: tables, plots and HTML from records."""

from nervure.report.audit_page import audit_files
from nervure.report.export import leaderboard_files, verdict_files
from nervure.report.tables import ArmRow, CaseTable, arm_rows, case_tables, contest_tables, no_faster

__all__ = [
    "ArmRow",
    "CaseTable",
    "arm_rows",
    "audit_files",
    "case_tables",
    "contest_tables",
    "leaderboard_files",
    "no_faster",
    "verdict_files",
]
