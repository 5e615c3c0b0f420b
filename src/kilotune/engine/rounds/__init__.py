"""Rounds: both sides of a federation's rounds, and the ledger that they are written to."""
