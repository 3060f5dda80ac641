"""The report: one HTML file that needs nothing else, of one dictionary or several."""

from saekit.evals.html.overview import Subject
from saekit.evals.html.page import write_report

__all__ = ["Subject", "write_report"]
