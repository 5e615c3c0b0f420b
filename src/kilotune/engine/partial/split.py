"""Split: clients that hold the first blocks and the last ones of a model, whose body stays at the server.

A round of a client: score all rows by the shortcut from the first blocks straight to the tail, and keep the hardest;
some steps on the loss of the shortcut, which cost nothing on the wire; then steps through the body: hidden states go up
at the lower cut and come down at the upper one, gradients the same way back. Four messages of T x h numbers per row of
T tokens, prompts included. What is trained (prompts, and pairs in the tail) is averaged as in any other federation.

This module says what a recipe may ask for and what it will cost; `splitclient` and `splitbody` are the two ends.

Source: Cao, Zhu and Gong, "SFPrompt: Communication-Efficient Split Federated Fine-Tuning for Large Pre-Trained Models
    over Resource-Limited Devices", arXiv 2407.17533; split learning: Gupta and Raskar, "Distributed learning of deep
    network over multiple agents", arXiv 1810.06060.
Departs: a row's score is the mean over its answer's tokens; the cut may lie behind some first blocks; rows are scored
    once a round, before its first step; phases count steps, not epochs.
"""

from collections.abc import Mapping
from fractions import Fraction
from math import ceil
from typing import TYPE_CHECKING

from kilotune.core.errors import RecipeError
from kilotune.engine.rounds.streaming import streams

if TYPE_CHECKING:
    from kilotune.engine.composing.plan import Plan

UP, DOWN = "activation_up_bytes", "activation_down_bytes"
"""Facts of an answer: bytes of the messages with hidden states and gradients that its steps have exchanged."""
WIDTHS = {"fp32": 4, "bf16": 2}
HEADER = 17  # bytes of a message before its numbers (DNS1)
ROWS, ROW = 8, 4  # bytes that the first message of a batch says about its rows: in all, and of each


def kept_count(rows: int, keep: float) -> int:
    """ceil(keep · rows), with `keep` as it was written: 0.07 of 100 rows are 7."""
    return ceil(Fraction(str(keep)) * rows)


def batch_bytes(rows: int, tokens: float, width: int, bytes_each: int) -> tuple[float, float]:
    """(up, down) of the messages of one batch whose rows have so many tokens in all, prompts included."""
    each_way = 2 * (HEADER + tokens * width * bytes_each)
    return ROWS + ROW * rows + each_way, each_way


def predicted_bytes(plan: "Plan", numel: dict[str, int], tokens: float | None) -> tuple[float, float]:
    """(up, down) of a client's messages in a round: for rows of so many tokens, or, without them, an upper bound from
    the most tokens that a row may have. Every row is a batch of its own in it."""
    recipe = plan.recipe
    if not recipe.split.enabled:
        return 0.0, 0.0
    prompts = int(plan.parametrization.prompts)  # type: ignore[attr-defined]
    width = numel["prompts"] // prompts
    row = prompts + (recipe.data.max_length if tokens is None else tokens)
    up, down = batch_bytes(1, row, width, WIDTHS[recipe.split.dtype])
    rows = recipe.local_steps * recipe.batch_size
    return rows * up, rows * down


def told_bytes(plan: "Plan", facts: Mapping[str, object]) -> tuple[int, int]:
    """(up, down) that an answer says its steps have exchanged."""
    told = [facts.get(key) if plan.recipe.split.enabled else 0 for key in (UP, DOWN)]
    up, down = (number if type(number) is int and number >= 0 else 0 for number in told)
    return up, down


def refuse_deployed(plan: "Plan") -> None:
    """Raises RecipeError for a recipe that machines cannot follow over Flower."""
    if plan.recipe.split.enabled:
        raise RecipeError(
            "split: each step takes two exchanges with the server, but over Flower a round is one request and one "
            "answer. Use `kilotune federate`, where the body is behind the same messages, or --set split.enabled=false "
            "with clients that hold the whole model."
        )


def split_clashes(plan: "Plan") -> list[str]:
    """What clients without a body do not go with."""
    recipe = plan.recipe
    if not recipe.split.enabled:
        return []
    kind, estimator = plan.parametrization.method_name(), plan.estimator.method_name()
    faults = {
        f"leaves a client the first and the last blocks alone, but parametrization {kind!r} trains others, too. "
        "Use parametrization: prompt_tail.": "tail" not in plan.parametrization.gives,
        f"needs 'dense_grad', but estimator {estimator!r} sends no gradients. Use estimator: backprop.": (
            "dense_grad" not in plan.estimator.gives
        ),
        "sends hidden states of rows, which privacy and secure_aggregation do not hide. Use it without them.": (
            plan.privacy is not None or recipe.secure_aggregation.enabled
        ),
        "has steps that are not a round's local_steps. Use it without streaming, and with optimizer: adamw.": (
            streams(plan) or plan.optimizer.hears
        ),
        "leaves the body as it is at the server. Use it without emulator and arms.": (
            recipe.emulator.active or bool(recipe.arms.pruning)
        ),
        "has no one to send to when one machine tunes alone. Use `kilotune federate`, or split.enabled: false.": (
            recipe.steps is not None
        ),
    }
    return [f"split {why}" for why, applies in faults.items() if applies]


def split_warning(plan: "Plan") -> list[str]:
    """What should be known before hidden states leave a device."""
    if not plan.recipe.split.enabled:
        return []
    what = (
        "the embedding of every token, which is as good as the text itself"
        if plan.recipe.split.lower == 0
        else "hidden states, from which much of the text can be found again"
    )
    return [
        f"split: the server sees {what}, of every row a client trains on. A larger split.lower makes that harder and "
        "not impossible; where the server may not see the rows, let clients hold the model (split.enabled: false)."
    ]
