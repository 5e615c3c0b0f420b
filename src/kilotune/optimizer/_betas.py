"""Betas: how long two moving means remember."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator


def _in_range(betas: tuple[float, float]) -> tuple[float, float]:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError("expected two numbers in [0, 1)")
    return betas


Betas = Annotated[tuple[float, float], AfterValidator(_in_range)]
