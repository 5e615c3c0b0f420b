"""Training: steps on one machine."""
