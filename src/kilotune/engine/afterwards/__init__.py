"""Afterwards: what can be done with a finished run: check it, repeat it, take a client out of it, carry it away."""
