"""Shared by all tests: its place puts this folder on the import path, so that `tiny` can be imported everywhere."""

import kilotune  # noqa: F401 - before torch, so that its arithmetic does not depend on the number of threads
