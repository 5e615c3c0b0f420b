"""Codecs that wrap others in whole recipes: what composes, and what is refused with a way out."""

import pytest

from kilotune.core.errors import RecipeError
from kilotune.engine.composing.compose import build, override, read

QUIET = ["defences.enabled=false", "secure_aggregation.enabled=true", "keep_contributions=never"]


def problems(recipe: str, *assignments: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        build(override(read(recipe), list(assignments)), "federate")
    return caught.value.problems


@pytest.mark.parametrize(
    ("recipe", "assignments", "message"),
    [
        (
            "fedavg_lora",
            ["uplink={name: residual, codec: {name: coefficients, error_feedback: false}}"],
            "needs a basis",
        ),
        (
            "fedavg_lora",
            ["uplink=topk", "aggregation=trimmed_mean"],
            "'trimmed_mean' needs numbers that all clients send",
        ),
        ("fedavg_lora", ["uplink={name: residual, codec: topk}", "aggregation=trimmed_mean"], "uplink: quantized"),
        ("fedavg_lora", ["uplink=randomk", "staleness.max=1"], "what uplink 'randomk' sends belongs to its own round"),
        (
            "fedavg_lora",
            ["uplink={name: residual, codec: {name: randomk, unbiased: false}}", "staleness.max=1"],
            "what uplink 'residual' sends belongs to its own round. Use uplink: dense",
        ),
        ("fedavg_lora", ["downlink=projection"], "downlink 'projection' needs pairs"),
        ("fedavg_lora", [*QUIET, "uplink=topk"], "cannot mask uplink 'topk': every client chooses what it sends"),
        ("fedavg_lora", [*QUIET, "uplink=residual"], "cannot mask uplink 'residual': its encoding is the method"),
    ],
)
def test_wrapped_codecs_clash_as_what_is_inside_them(recipe: str, assignments: list[str], message: str) -> None:
    """Kills: a check that goes by the name of the outer codec."""
    (found,) = [line for line in problems(recipe, *assignments) if message in line]
    assert " Use " in found


@pytest.mark.parametrize(
    ("uplink", "message"),
    [
        (
            "{name: residual, codec: seed_scalar}",
            "uplink.codec: got 'seed_scalar', expected a codec that brings tensors",
        ),
        ("{name: residual, codec: {name: projection}}", "which projection does not; use topk"),
        (
            "{name: topk, values: coefficients}",
            "uplink.values: got 'coefficients', expected a codec that keeps no errors",
        ),
        ("{name: residual, codec: topkk}", "uplink.codec: got 'topkk', expected "),
    ],
)
def test_codecs_that_cannot_be_wrapped_are_refused_by_place_with_one_that_can(uplink: str, message: str) -> None:
    """Kills: a traceback for a part within a part; an error without the place."""
    (found,) = problems("fedavg_lora", f"uplink={uplink}")
    assert message in found


def test_wrapped_codecs_compose_and_are_shown_as_they_are_written() -> None:
    """Kills: a recipe id that does not depend on the codec inside; a resolved recipe that does not compose again."""
    inside = "{name: residual, codec: {name: topk, density: 0.1, values: {name: quantized, bits: 8}}}"
    plan = build(override(read("fedavg_lora"), [f"uplink={inside}"]), "federate")
    assert plan.resolved()["uplink"]["codec"]["values"]["bits"] == 8
    assert build(plan.resolved(), "federate").id == plan.id
    other = build(override(plan.resolved(), ["uplink.codec.values.bits=7"]), "federate")
    assert other.id != plan.id
    shared = build(override(read("fedavg_lora"), ["uplink=randomk", "aggregation=trimmed_mean"]), "federate")
    assert shared.uplink.traits == {"round_bound", "summable", "values"}
