"""Numbers as people read them: decimal bytes (1 kB = 1000 B, as in every figure of this project) and seconds."""

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def byte_unit(largest: float) -> tuple[float, str]:
    """The unit in which `largest` reads best: (bytes per unit, its name)."""
    index = 0
    while index + 1 < len(_BYTE_UNITS) and largest >= 1000 ** (index + 1):
        index += 1
    return 1000.0**index, _BYTE_UNITS[index]


def human_bytes(n: float) -> str:
    """'873 B', '4.1 kB', '134 MB'."""
    for unit in _BYTE_UNITS:
        text = f"{n:.0f}" if unit == "B" or abs(n) >= 99.95 else f"{n:.1f}"
        if abs(float(text)) < 1000:
            break
        n /= 1000
    return f"{text} {unit}"


def human_seconds(s: float) -> str:
    """'0.42 s', '12.3 s', '4 min 05 s', '2 h 07 min', '3 d 4 h'."""
    if s < 59.95:
        return f"{s:.2f} s" if s < 1 else f"{s:.1f} s"
    whole = round(s)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(s / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(s / 3600)
    return f"{hours // 24} d {hours % 24} h"
