"""Recipe: the YAML a user writes. One value per choice; unknown keys are refused with the nearest name."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Spec = dict[str, Any]
"""A part: {name: <method>, <its fields>}. A bare word is short for {name: word}."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSection(Section):
    path: str = Field("households", description="file, folder, hub id, or the embedded set 'households'")
    eval_path: str | None = Field(None, description="evaluation rows from elsewhere; default: rows with split = test")
    format: str = Field("auto", description="auto (by the fields), or the name of a format")
    template: Literal["chat", "plain", "alpaca"] = Field("chat", description="layout of a conversation as text")
    system: str | None = Field(None, description="system turn for rows without one; none: the template's own")
    max_length: int = Field(512, ge=8, description="tokens per row; longer rows are cut, never to nothing")
    answer_only: bool = Field(True, description="loss on the answer's tokens only")
    only: str | None = Field(None, description="train on the rows of this client alone; evaluation rows stay all")
    limit: int | None = Field(None, ge=1, description="training rows at most, per client")


class EvaluationSection(Section):
    every: int = Field(
        0, ge=0, description="rounds (federate) or steps (tune) between evaluations; 0: before and after"
    )
    limit: int | None = Field(200, ge=1, description="evaluation rows at most, spread evenly over the clients")
    generate: bool = Field(True, description="also generate answers (exact match, ROUGE-L); false: loss only")
    max_new_tokens: int = Field(48, ge=1, description="tokens generated per row at most")


class ClientGroup(Section):
    """Clients that differ from the rest of the recipe (a mixed federation)."""

    share: float = Field(gt=0, le=1, description="fraction of the clients, the first ones in order of name")
    estimator: Spec | None = None
    optimizer: Spec | None = None
    local_steps: int | None = Field(None, ge=1)


class Recipe(Section):
    title: str = Field("", description="what this recipe is, one line")
    source: str = Field("", description="paper: authors, title, where")
    seed: int = Field(0, ge=0, lt=1 << 32, description="every random number of the run follows from it")
    base: str = Field("smollm2-135m", description="alias, local folder, GGUF file or hub id")

    rounds: int | None = Field(None, ge=1, description="federate: rounds")
    steps: int | None = Field(None, ge=1, description="tune: optimizer steps in all")
    local_steps: int = Field(5, ge=1, description="optimizer steps per client and round; tune: steps between commits")
    batch_size: int = Field(16, ge=1, description="rows per optimizer step")
    micro_batch_tokens: int = Field(1024, ge=1, description="tokens per forward pass at most; bounds the activations")
    checkpointing: bool = Field(False, description="make activations twice instead of keeping them: memory for time")
    precision: Literal["fp32", "bf16", "auto"] = Field(
        "fp32", description="of matrix products; auto: bf16 where this machine is measured to be faster with it"
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="decay over the whole run")
    warmup_frac: float = Field(0.0, ge=0, lt=1, description="fraction of the run in which the rate rises from 0")
    keep_optimizer: bool = Field(False, description="keep the local optimizer's state between rounds")
    threads: int | None = Field(None, ge=1, description="CPU threads; default: all cores; never changes a result")
    min_clients: int = Field(1, ge=1, description="clients that must answer for a round to count")
    deadline_s: float = Field(600.0, gt=0, description="seconds a round waits for its clients (deployed)")
    patience: int | None = Field(None, ge=1, description="stop after this many evaluations without a better loss")

    data: DataSection = DataSection()
    evaluation: EvaluationSection = EvaluationSection()
    clients: tuple[ClientGroup, ...] = ()

    partition: Spec | None = None
    parametrization: Spec | None = None
    basis: Spec | None = None
    estimator: Spec | None = None
    optimizer: Spec | None = None
    uplink: Spec | None = None
    downlink: Spec | None = None
    aggregation: Spec | None = None
    server_optimizer: Spec | None = None
    schedule: Spec | None = None


SECTIONS: dict[str, type[Section]] = {"data": DataSection, "evaluation": EvaluationSection}
PARTS: dict[str, str] = {
    "partition": "partition",
    "parametrization": "parametrization",
    "basis": "basis",
    "estimator": "estimator",
    "optimizer": "optimizer",
    "uplink": "codec",
    "downlink": "codec",
    "aggregation": "aggregation",
    "server_optimizer": "optimizer",
    "schedule": "schedule",
}
"""Recipe key -> kind folder."""

FEDERATED_ONLY = ("partition", "aggregation", "server_optimizer", "schedule", "clients")
"""Keys that mean nothing to a recipe that is tuned on one machine."""
