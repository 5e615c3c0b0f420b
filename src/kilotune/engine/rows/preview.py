"""Preview: a data file as a model will see it."""

from collections import Counter
from typing import Any

from kilotune.engine.composing.recipe import DataSection
from kilotune.engine.rows.data import load_rows
from kilotune.engine.rows.filetokenizer import light_tokenizer
from kilotune.engine.rows.tokenize import encode, show


def preview(path: str, limit: int, base: str, template: str, max_length: int) -> dict[str, Any]:
    """The first rows with loss-carrying stretches marked, and counts over all rows."""
    settings = DataSection.model_validate({"path": path, "template": template, "max_length": max_length})
    rows = load_rows(path)
    tokenizer = light_tokenizer(base)
    _, report = encode(rows, tokenizer, settings)
    return {
        "rows": [shown.as_dict() for shown in show(rows, tokenizer, settings, limit)],
        "num_rows": len(rows),
        "splits": dict(Counter(row.split for row in rows).most_common()),
        "clients": dict(sorted(Counter(row.client for row in rows if row.client is not None).items())),
        "num_truncated": report.num_truncated,
        "tokens": report.tokens,
        "label_tokens": report.label_tokens,
        "template": report.template,
    }
