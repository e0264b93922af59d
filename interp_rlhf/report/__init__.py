"""The report: run logs in, one self-contained HTML page, one Markdown page and their plots out.

Knows run logs and nothing else of the project; imports neither torch nor TRL, and loads matplotlib and jinja2 only
when a report is written.
"""

from .page import write_model_card, write_report

__all__ = ["write_model_card", "write_report"]
