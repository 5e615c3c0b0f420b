"""Partial: clients that hold or train a part of the model only."""
