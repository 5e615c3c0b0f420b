"""Shared by all tests: its place puts this folder on the import path, so that `tiny` can be imported everywhere."""

import os
import signal
from pathlib import Path

import pytest

import kilotune  # noqa: F401 - before torch, so that its arithmetic does not depend on the number of threads


@pytest.fixture(scope="session", autouse=True)
def nobody_waits_for_the_disk():
    """Nothing here outlives a power cut. A descriptor that is none is still an error."""
    real, os.fsync = os.fsync, lambda descriptor: os.fstat(descriptor) and None
    yield
    os.fsync = real


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard():
    """A shell that starts the tests in the background has told them to ignore it; some press it themselves."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """The tiny model as a Hugging Face folder; nobody writes into it."""
    from tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Rows of three clients, a quarter of them held out."""
    from federating import write_rows

    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")
