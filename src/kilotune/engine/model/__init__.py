"""Model: loading a base, computing with it, measuring it, and what becomes of a tuned one."""
