"""A run, or several, as one self-contained HTML page."""

from jaxpost.report.compare import write_comparison
from jaxpost.report.write import write_report

__all__ = ["write_comparison", "write_report"]
