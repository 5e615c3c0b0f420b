"""Tuned: whatever a user points at — run folder, seed file, exported folder, base — becomes a model in memory."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kilotune.core.errors import ModelError, RunError, WireError
from kilotune.core.noise import NOISE_SPEC
from kilotune.engine.afterwards import seedfile
from kilotune.engine.composing.compose import build
from kilotune.engine.composing.plan import Plan
from kilotune.engine.composing.recipe import DataSection
from kilotune.engine.files import read_tensors
from kilotune.engine.model.base import Base, load_base
from kilotune.engine.model.export import check_plain
from kilotune.engine.rounds.ledger import LEDGER, Ledger
from kilotune.engine.rounds.personal import personal_tensors
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.runfolder import RECIPE, RunFolder
from kilotune.engine.training.tune import CHECKPOINT


@dataclass(frozen=True)
class Tuned:
    """A model to look at. `ledger` and `plan` are None where there is no run behind it."""

    base: Base
    model: nn.Module
    plan: Plan | None = None
    ledger: Ledger | None = None
    replica: Replica | None = None

    @property
    def data(self) -> DataSection:
        """How the model's text was laid out."""
        return self.plan.recipe.data if self.plan is not None else DataSection()

    def state(self) -> dict[str, Tensor]:
        """Tensors that define the model beyond its base; for a plain model, all of them."""
        if self.replica is not None:
            return self.replica.trainable.state() | self.replica.trainable.own()
        return {name: param.data for name, param in self.base.parameters().items()}


def open_tuned(target: str, base_name: str | None = None, personal: Path | None = None) -> Tuned:
    """Load what `target` names; `personal` is the folder of a client whose own tensors shall be part of the model.

    Raises WireError when the base is not the one the run stands on.
    """
    tuned = _opened(target, base_name)
    if personal is None:
        return tuned
    if tuned.plan is None or tuned.ledger is None or tuned.replica is None:
        raise RunError(f"--personal {personal}: {target} is no run of several clients. Leave it out.")
    tuned.replica.trainable.take_up(personal_tensors(personal, tuned.plan, tuned.ledger))
    return tuned


def _opened(target: str, base_name: str | None) -> Tuned:
    path = Path(target)
    if seedfile.is_seed_file(path):
        return from_ledger(seedfile.read(path), base_name)
    if (path / LEDGER).exists():
        return from_ledger(Ledger.load(path), base_name)
    if (path / RECIPE).exists():
        return _from_checkpoint(path, base_name)
    base = load_base(target, writable=False)
    return Tuned(base, base.model)


def plan_of(resolved: dict[str, Any]) -> Plan:
    """The plan of a finished run from its resolved recipe."""
    return build(resolved, "tune" if resolved.get("steps") else "federate")


def from_ledger(ledger: Ledger, base_name: str | None) -> Tuned:
    """Base + all rounds."""
    if ledger.header.noise_spec != NOISE_SPEC:
        raise WireError(
            f"the ledger's noise follows spec {ledger.header.noise_spec}, this kilotune makes spec {NOISE_SPEC}. "
            "Use the version of kilotune that wrote it."
        )
    plan = plan_of(ledger.header.recipe)
    if plan.id != ledger.header.recipe_id:
        raise WireError(
            f"the ledger's recipe has id {plan.id}, its header says {ledger.header.recipe_id}: it was altered, "
            "or written by another version of kilotune."
        )
    # Only full rounds write into the weights where they lie; all others leave the base a mapping of its file.
    base = _base(ledger.header.base, base_name, writable=plan.parametrization.method_name() == "full")
    if base.digest != ledger.header.base_digest:
        raise WireError(
            f"base {base.name!r} has digest {base.digest[:16]}, but these rounds stand on "
            f"{ledger.header.base_digest[:16]} ({ledger.header.base}). Give that model with --base."
        )
    replica = Replica(base, plan)
    replica.replay((record.round, payload) for record, payload in ledger.since(0))
    if replica.middle is not None:
        replica.middle.put_back()  # what was tuned is the full model with the new ends
    return Tuned(base, replica.model, plan, ledger, replica)


def _base(recorded: str, given: str | None, writable: bool) -> Base:
    """The base of a run, from where the user says it is or else from where it was."""
    try:
        return load_base(given or recorded, writable=writable)
    except ModelError as error:
        if given is None and os.sep in recorded and not Path(recorded).exists():
            raise ModelError(f"{error} If the base of this run lies elsewhere, give it with --base.") from None
        raise


def _from_checkpoint(path: Path, base_name: str | None) -> Tuned:
    plan = plan_of(RunFolder(path).recipe())
    if not (path / CHECKPOINT).exists():
        raise RunError(f"{path}: the run has no {CHECKPOINT} yet. Run its command again to go on.")
    tensors, facts = read_tensors(path / CHECKPOINT)
    base = _base(plan.recipe.base, base_name, writable=True)
    if base.digest != facts["base_digest"]:
        raise WireError(
            f"base {base.name!r} has digest {base.digest[:16]}, but this run stands on {facts['base_digest'][:16]}. "
            "Give that model with --base."
        )
    replica = Replica(base, plan)
    replica.trainable.restore({k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")})
    return Tuned(base, replica.model, plan, None, replica)


def require_adapter(tuned: Tuned) -> Replica:
    """The replica of a run whose result is a PEFT adapter. Raises ModelError."""
    check_plain(tuned.model)
    if tuned.plan is None or tuned.replica is None or "adapter" not in tuned.plan.parametrization.gives:
        kind = tuned.plan.parametrization.method_name() if tuned.plan else "a plain model"
        raise ModelError(f"a PEFT folder holds an adapter, but this is {kind}. Use --to hf.")
    return tuned.replica
