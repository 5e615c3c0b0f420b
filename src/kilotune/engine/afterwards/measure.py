"""Measure, replay and export: what the commands on a finished run do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kilotune.core.errors import RunError
from kilotune.engine.afterwards.seedfile import is_seed_file
from kilotune.engine.afterwards.seedfile import read as read_seed_file
from kilotune.engine.model.base import weights_digest
from kilotune.engine.model.evaluation import evaluate
from kilotune.engine.model.export import export_model, export_peft
from kilotune.engine.model.tuned import Tuned, from_ledger, open_tuned, require_adapter
from kilotune.engine.rounds.ledger import LEDGER, Ledger
from kilotune.engine.rows.data import load_rows, select
from kilotune.engine.rows.shares import spread
from kilotune.engine.rows.tokenize import encode, stop_ids
from kilotune.engine.runfolder import RECIPE

Emit = Callable[[dict[str, Any]], None]


def measure(
    target: str,
    data: str,
    split: str,
    limit: int | None,
    max_new_tokens: int,
    max_length: int,
    template: str | None,
    base_name: str | None,
    emit: Emit,
    personal: Path | None = None,
) -> dict[str, Any]:
    """Quality of a base, a run, a seed file or an exported model on the rows of a file."""
    rows = load_rows(data)
    rows = spread(rows if split == "all" else select(rows, split, data), limit, 0)
    emit({"event": "status", "text": f"loading {target}"})
    tuned = open_tuned(target, base_name, personal)
    changes: dict[str, Any] = {"path": data, "max_length": max_length}
    settings = tuned.data.model_copy(update=changes | ({"template": template} if template else {}))
    examples, report = encode(rows, tuned.base.tokenizer, settings)
    result = evaluate(
        tuned.model,
        tuned.base.tokenizer,
        examples,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids(tuned.base.tokenizer, settings),
        progress=lambda done, total: emit({"event": "progress", "what": "evaluating", "done": done, "total": total}),
    )
    return {"model": target, "data": data, "split": split, "num_truncated": report.num_truncated, **result.to_json()}


def replay(run: Path, base_name: str | None, emit: Emit, checkpoint: Path | None = None) -> dict[str, Any]:
    """Verify the chain and rebuild the weights; with `checkpoint`, write them there for a client that joins late."""
    if (run / RECIPE).exists() and not (run / LEDGER).exists():
        raise RunError(
            f"{run}: this run moved no basis, so it keeps a checkpoint and no ledger: there is nothing to replay. "
            "Look at it with kilotune evaluate."
        )
    ledger = read_seed_file(run) if is_seed_file(run) or run.is_file() else Ledger.load(run)
    emit({"event": "status", "text": f"replaying {len(ledger)} rounds"})
    tuned = from_ledger(ledger, base_name)
    if checkpoint is not None and tuned.replica is not None:
        tuned.replica.save(checkpoint, ledger.head)
    return {
        "run": str(run),
        "rounds": len(ledger),
        "verified": True,
        "digest": weights_digest(tuned.state()),
        "ledger_head": ledger.head,
        "base_digest": tuned.base.digest,
    }


def export(
    target: str, folder: Path, to: str, base_name: str | None, emit: Emit, personal: Path | None = None
) -> dict[str, Any]:
    """Write a Hugging Face folder (merged) or a PEFT folder; both are re-read and compared before they count."""
    emit({"event": "status", "text": f"loading {target}"})
    tuned: Tuned = open_tuned(target, base_name, personal)
    digest = weights_digest(tuned.state())
    emit({"event": "status", "text": f"writing {folder} and checking it"})
    if to == "peft":
        export_peft(require_adapter(tuned).model, tuned.base, folder)
    else:
        export_model(tuned.model, tuned.base, folder)
    return {"folder": str(folder), "to": to, "digest": digest, "checked": True}
