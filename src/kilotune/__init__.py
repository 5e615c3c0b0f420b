"""kilotune: fine-tune a language model on one small device, or together over many, for kilobytes."""

import os
from pathlib import Path

__version__ = "0.1.0"


def _reproducible_arithmetic() -> None:
    """MKL splits long sums by threads; its strict mode does not, so a run's digest depends on no thread count.

    MKL reads the variable once, at its first call, so it is set before anything can import torch. A value of the
    user's own stays. AVX-512 strict costs nothing measurable; the others are slower (docs/log.md).
    """
    if "MKL_CBWR" in os.environ:
        return
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        text = ""
    flags = text.partition("flags")[2].partition("\n")[0].split()
    best = "AVX512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "COMPATIBLE"
    os.environ["MKL_CBWR"] = best if best == "COMPATIBLE" else f"{best},STRICT"


def _short_waits() -> None:
    """GNU OpenMP lets torch's idle threads spin for milliseconds, on the cores on which our own kernels run next.

    A thousand turns, some tens of microseconds, still bridge the gaps between a model's products. Read once, when
    torch is loaded; a user's own policy stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


_reproducible_arithmetic()
_short_waits()
