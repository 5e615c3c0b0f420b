"""Machine code: numba's compiler as every compiled loop of the project uses it."""

from collections.abc import Callable
from typing import Any


def machine_code(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compiled at its first call, free of the interpreter lock, cached on disk where some folder is writable."""
    from numba import njit  # half a second to import

    try:
        return njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache folder can be written
        return njit(nogil=True, **options)(function)
