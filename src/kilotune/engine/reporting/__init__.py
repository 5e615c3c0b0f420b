"""Reporting: a run as one page, and the catalogue of methods."""
