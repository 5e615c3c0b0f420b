"""Errors a user can cause. One form: `where: got value, expected constraint. Fix.`

Every error here ends a command with exit code 2 (a mistake) or 1 (the world failed) and one clear line;
any other exception is a bug in kilotune and keeps its traceback.
"""


class KilotuneError(Exception):
    """Base of all errors shown to the user without a traceback."""

    exit_code = 2


class RecipeError(KilotuneError):
    """The recipe is wrong. `problems` holds every mistake found, one line each."""

    def __init__(self, *problems: str) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(problems))


class IncompatibleError(RecipeError):
    """Two parts of a recipe do not fit; the message names both and a working pair."""


class DataError(KilotuneError):
    """A data file is missing or a row is wrong; the message starts with file:line."""


class WireError(KilotuneError):
    """A payload, ledger or seed file is cut, foreign, altered or meant for another base."""


class ModelError(KilotuneError):
    """A base model cannot be found, loaded, held in memory or exported."""


class RunError(KilotuneError):
    """A run folder cannot be used as asked (another recipe, not a run, disk full)."""

    exit_code = 1


class FederationError(KilotuneError):
    """Server or client cannot go on: port taken, server unreachable, refused, too few clients."""

    exit_code = 1
