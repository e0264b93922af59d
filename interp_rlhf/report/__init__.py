"""The report: run logs in, one self-contained HTML page, one Markdown page and their plots out.

It imports `runlog` and no other room, neither torch nor TRL. It loads matplotlib and jinja2 only when it writes a report.
"""

from .page import write_model_card, write_report

__all__ = ["write_model_card", "write_report"]
