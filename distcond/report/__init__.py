"""`distcond report RUN...`: runs as one HTML page that needs no network."""

from distcond.report.page import report

__all__ = ["report"]
