"""One page for each suite, and its figures."""

from clipadapt.evaluation.report.page import check_installed, write_report

__all__ = ["check_installed", "write_report"]
