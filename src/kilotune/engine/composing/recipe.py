"""Recipe: the YAML a user writes. One value per choice; unknown keys are refused with the nearest name."""

from typing import Annotated, Any, Literal

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
    min_clients: int = Field(
        1, ge=1, description="clients whose sums a figure may be made of at least; of fewer nothing is told (deployed)"
    )


class DefencesSection(Section):
    """What the server believes of a payload (docs/defences.md)."""

    enabled: bool = Field(True, description="false: payloads count as they come")
    scalar_factor: float = Field(5.0, ge=1, description="largest |scalar|, in medians of the last rounds' scalars")
    norm_factor: float = Field(2.0, ge=1, description="largest norm of an update, in medians of the round's norms")
    weight_cap: float = Field(2.0, ge=1, description="largest weight of a client, in 1/n of the round's n clients")
    gate: float | None = Field(
        None, ge=0, description="reject a round that raises the loss on the server's rows by more than this; none: off"
    )


class SecureSection(Section):
    """The server sees the sum of a round's updates and no single one (docs/secure_aggregation.md)."""

    enabled: bool = Field(False, description="true: clients send masked integers whose masks cancel in the sum")
    threshold: float = Field(
        0.6, gt=0.5, le=1, description="fraction of a round's clients that must stay to its end; lets a third drop out"
    )
    bits: Literal[16, 32] = Field(32, description="size of a masked number on the wire")
    clip: float = Field(1.0, gt=0, description="largest |number| of an update; the client cuts what is larger")
    max_clients: int = Field(
        128, ge=2, le=4096, description="clients of a round at most; sets how fine the integers are"
    )
    max_weight: int = Field(1024, ge=1, description="largest weight of a client; 1 for aggregation.weighting: equal")
    rounding: Literal["nearest", "stochastic"] = Field("nearest", description="of a number to an integer")


class StalenessSection(Section):
    """Answers that come after their round (docs/faults.md)."""

    max: int = Field(0, ge=0, description="rounds by which an answer may be late and still count; 0: none may")
    power: float = Field(
        0.5, ge=0, description="a late answer weighs (1 + rounds late)^-power of an answer in time; FedAsync, a"
    )


class StreamingSection(Section):
    """Results that clients take late or in part (Streaming DiLoCo)."""

    overlap: int = Field(0, ge=0, description="local steps before a client takes what the last rounds brought")
    mixing: float = Field(0.0, ge=0, lt=1, description="share of its own weights that it keeps then")


class SplitSection(Section):
    """Clients without the body of the model, which stays at the server (SFPrompt)."""

    enabled: bool = Field(False, description="true: clients hold first and last blocks, hidden states go to the server")
    lower: int = Field(0, ge=0, description="first blocks that a client holds; 0: the embedding alone, as in the paper")
    keep: float = Field(
        0.5, gt=0, le=1, description="share of its rows that a client trains on, the hardest; paper: 0.5"
    )
    shortcut_steps: int = Field(
        10, ge=0, description="steps past the body before the local_steps through it; paper: 10 epochs"
    )
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="numbers of hidden states and gradients on the wire")


class EmulatorSection(Section):
    """Clients that hold and train the ends of a model around a thinned, frozen middle (docs/recipes.md)."""

    left: int = Field(0, ge=0, description="first blocks, which are trained; at least one is. FedOT on 32 blocks: 2")
    right: int = Field(
        0, ge=0, description="block from which on all are trained; the last one is. FedOT on 32 blocks: 30; 0: off"
    )
    drop: float = Field(0.2, ge=0, lt=1, description="share of the blocks between that clients do not hold; FedOT: 0.2")
    align_steps: int = Field(0, ge=0, description="steps of aligning the thin middle before round 1; FedOT: 500")
    align_path: str | None = Field(None, description="rows of the server to align on")
    align_lr: float = Field(1e-4, gt=0, description="learning rate of aligning; FedOT")
    align_kd: float = Field(
        0.9, ge=0, le=1, description="weight of the distance between the middles, the rest is the answers' loss; FedOT"
    )

    @property
    def active(self) -> bool:
        return self.left > 0 or self.right > 0


class ArmsSection(Section):
    """What the server may ask of each device, learnt from what pays there (FedSpine, docs/recipes.md)."""

    pruning: tuple[Annotated[float, Field(ge=0, le=0.9)], ...] = Field(
        (), description="shares of the heads and feed-forward channels to leave out, rising; none: all devices do alike"
    )
    ranks: tuple[Annotated[int, Field(ge=1)], ...] = Field((), description="ranks to train, rising")
    share: Literal["group", "client"] = Field(
        "group", description="who learns together: the devices of a group of `clients`, or each for itself"
    )
    exploration: float = Field(
        0.25, ge=0, description="c of mean + c sqrt(ln t / n); UCB1 has 1.4, for rewards that are 0 or 1"
    )
    deadline: float = Field(
        1.0, gt=0, description="time of a round, in that of the median device with the first arm; later, it earns less"
    )


class ShardingSection(Section):
    """Tuning from which rows can be forgotten exactly (docs/unlearning.md)."""

    slices: int = Field(0, ge=0, description="slices of a shard's rows, each training layers of its own; 0: off")
    shards: int = Field(1, ge=1, description="parts of the rows that are trained apart; their changes are averaged")
    orders: int | None = Field(
        None, ge=1, description="orders of the slices that are kept ready; default: one beginning with each slice"
    )
    cumulative: bool = Field(
        True, description="a stage also sees the slices before its own, as in S3T, figure 2; false: its own alone"
    )


class ClientGroup(Section):
    """Clients that differ from the rest of the recipe (a mixed federation)."""

    share: float = Field(gt=0, le=1, description="fraction of the clients, the first ones in order of name")
    estimator: Spec | None = None
    optimizer: Spec | None = None
    local_steps: int | None = Field(None, ge=1)
    rank: int | None = Field(None, ge=1, description="rank of these clients' pairs, at most parametrization.rank")
    ranks: dict[str, int] | None = Field(
        None, description="the matrices they train, by names or parts of names, and the rank of each; none: all"
    )
    batch_size: int | None = Field(None, ge=1)
    precision: Literal["fp32", "bf16", "auto"] | None = None
    slowness: float = Field(1.0, gt=0, description="their time for a unit of work where devices are simulated (arms)")


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
    checkpointing: float = Field(
        0.0, ge=0, le=1, description="share of the layers whose activations are made twice, not kept; true: all"
    )
    precision: Literal["fp32", "bf16", "auto"] = Field(
        "fp32", description="of matrix products; auto: bf16 where this machine is measured to be faster with it"
    )
    lr_schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        "constant", description="decay over the whole run; wsd (warm-up, stable, decay): linear over its second half"
    )
    warmup_frac: float = Field(0.0, ge=0, lt=1, description="fraction of the run in which the rate rises from 0")
    keep_optimizer: bool = Field(False, description="keep the local optimizer's state between rounds")
    threads: int | None = Field(None, ge=1, description="CPU threads; default: all cores; never changes a result")
    min_clients: int = Field(1, ge=1, description="clients that must answer for a round to count")
    adapt_steps: bool = Field(
        False, description="slow clients take fewer local steps, as many as the median client of their group (deployed)"
    )
    deadline_s: float = Field(600.0, gt=0, description="seconds a round waits for its clients (deployed)")
    shared_directions: bool = Field(
        False, description="all forward-only clients of a round probe the same directions, so that each has many votes"
    )
    keep_contributions: Literal["auto", "always", "never"] = Field(
        "auto", description="keep what clients sent, for withdrawals and audits; auto: up to 16 MiB a round"
    )
    patience: int | None = Field(None, ge=1, description="stop after this many evaluations without a better loss")

    data: DataSection = DataSection()
    evaluation: EvaluationSection = EvaluationSection()
    defences: DefencesSection = DefencesSection()
    secure_aggregation: SecureSection = SecureSection()
    staleness: StalenessSection = StalenessSection()
    streaming: StreamingSection = StreamingSection()
    split: SplitSection = SplitSection()
    arms: ArmsSection = ArmsSection()
    sharding: ShardingSection = ShardingSection()
    emulator: EmulatorSection = EmulatorSection()
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
    privacy: Spec | None = None

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps of a client in a round, those of a shortcut included."""
        return self.local_steps + (self.split.shortcut_steps if self.split.enabled else 0)

    @property
    def most_local_steps(self) -> int:
        """Local steps of the clients that take most."""
        return max([self.local_steps, *(group.local_steps or 0 for group in self.clients)])


SECTIONS: dict[str, type[Section]] = {
    "data": DataSection,
    "evaluation": EvaluationSection,
    "defences": DefencesSection,
    "secure_aggregation": SecureSection,
    "staleness": StalenessSection,
    "streaming": StreamingSection,
    "split": SplitSection,
    "arms": ArmsSection,
    "sharding": ShardingSection,
    "emulator": EmulatorSection,
}
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
    "privacy": "privacy",
}
"""Recipe key -> kind folder."""

CODECS = ("uplink", "downlink")
FEDERATED_ONLY = ("partition", "aggregation", "server_optimizer", "schedule", "clients", "privacy")
"""Keys that mean nothing to a recipe that is tuned on one machine."""
