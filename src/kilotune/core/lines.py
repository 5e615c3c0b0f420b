"""Lines: text from elsewhere made fit to be shown to an operator."""


def clean(text: object, limit: int | None = None) -> str:
    """One printable line, cut at `limit`: a client's name or error must not move a terminal's cursor, turn the
    direction of the text around or fill a page."""
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    return line if limit is None or len(line) <= limit else line[: limit - 1] + "…"
