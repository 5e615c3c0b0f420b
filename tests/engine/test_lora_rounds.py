"""Rounds of exact LoRA: weights are the base plus the sum of the clients' products; misfits are refused."""

import re
from collections import defaultdict

import numpy as np
import pytest

from federating import plan, quiet
from kilotune.core.errors import IncompatibleError, RecipeError
from kilotune.core.factors import A, factor_pairs
from kilotune.engine.afterwards.redo import CONTRIBUTIONS, Shelf
from kilotune.engine.model.base import load_base
from kilotune.engine.model.tuned import from_ledger
from kilotune.engine.rounds.book import read_entries
from kilotune.engine.rounds.ledger import Ledger
from kilotune.engine.session import federate

SHORT = ("local_steps=1", "evaluation.limit=2")


def test_the_rounds_of_flora_add_up_to_what_its_clients_sent(base, data, tmp_path):
    """Kills: factors averaged one by one; a weight counted twice; ranks lost on the wire; a base that stays."""
    recipe = plan(base, data, "flora", "uplink.dtype=fp32", "downlink.dtype=fp32", *SHORT)
    summary = federate(recipe, tmp_path, quiet)
    ledger = Ledger.load(tmp_path)
    tuned = from_ledger(ledger, None)
    assert tuned.replica.digest() == summary["digest"]
    start = {name: p.data.double().numpy() for name, p in load_base(str(base)).parameters().items()}
    expected = dict(start)
    ranks = defaultdict(set)
    shelf = Shelf(tmp_path / CONTRIBUTIONS, "always")
    for record in ledger.records:
        weights = {part.client: part.weight for part in record.contributions}
        for entry, _ in read_entries(shelf.path(record.round)):
            ranks[entry.client].add(int.from_bytes(entry.payload[4:8], "little"))
            sent = recipe.uplink.decode(entry.payload, tuned.replica.context(record.round)).tensors
            for b, a in factor_pairs(sent):
                name = a.split(".", 2)[-1].partition(A)[0] + ".weight"
                change = sent[b].double().numpy() @ sent[a].double().numpy()
                expected[name] = expected[name] + weights[entry.client] * 2.0 * change
    assert ranks == {"ada": {4}, "bob": {8}, "cyd": {8}}
    for name, value in tuned.state().items():
        weight = name.split(".", 2)[-1]
        np.testing.assert_allclose(value.numpy(), expected[weight], atol=2e-6)
        assert np.abs(expected[weight] - start[weight]).max() > 1e-4


def test_the_digest_does_not_depend_on_the_number_of_threads(base, data, tmp_path):
    """Kills: a decomposition whose sums follow the threads."""
    recipes = {threads: plan(base, data, "flex_lora", f"threads={threads}", *SHORT) for threads in (1, 3)}
    digests = {federate(recipe, tmp_path / str(threads), quiet)["digest"] for threads, recipe in recipes.items()}
    assert len(digests) == 1


def test_fed_sb_runs_under_client_level_privacy(base, data, tmp_path):
    """Kills: a start that was made from somebody's rows; an update that cannot be clipped as one vector."""
    private = ["aggregation.weighting=equal", "privacy.name=central", "privacy.clip=0.5", "privacy.epsilon=8.0"]
    recipe = plan(base, data, "fed_sb", *private, "privacy.delta=1e-5", "privacy.clients=3", "rounds=1", *SHORT)
    summary = federate(recipe, tmp_path, quiet)
    assert 0 < summary["privacy"]["epsilon"] <= 8


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("flora", ["aggregation.name=mean"], "Use aggregation: flex_lora"),
        ("fedavg_lora", ["aggregation.name=flora_stack"], "Use parametrization: lora_merged, or aggregation: mean"),
        ("fedavg_lora", ["aggregation.name=flex_lora"], "Use parametrization: lora_"),
        ("flex_lora", ["aggregation.name=flora_stack"], "Use parametrization: lora_merged, or aggregation: flex_lora"),
        (
            "flora",
            ["uplink.name=dense"],
            "uplink 'dense' cannot send pairs whose rank it does not know. Use uplink: low",
        ),
        ("flora", ["downlink.name=dense"], "Use downlink: low_rank"),
        ("flora", ["server_optimizer={name: sgd, lr: 0.5}"], "would scale the tensors"),
        ("flora", ["defences.gate=0.1"], "Use --set defences.gate=null"),
        ("flex_lora", ["aggregation={name: lora_fair}"], "'lora_fair' needs clients of one rank"),
        ("flora", ["clients=[{share: 0.5, rank: 9}]"], "got 9, expected at most parametrization.rank = 8"),
        ("fed_sb", ["clients=[{share: 0.5, rank: 4}]"], "'lora_sb' has one rank for all"),
        ("fedavg_lora", ["clients=[{share: 0.5, rank: 4}]"], "'peft' has one rank for all"),
        ("fed_sb", ["parametrization.start=gradient"], "Use start: weight, or `kilotune tune`"),
        ("local_unlearning", ["parametrization.freeze=[lora_A]"], "method: lora} without"),
        ("fed_sb", ["uplink={name: seed_scalar}"], "Use parametrization: subspace, or uplink: dense"),
        (
            "flora",
            ["secure_aggregation.enabled=true", "defences.enabled=false"],
            "hides what aggregation 'flora_stack' needs",
        ),
    ],
)
def test_parts_that_do_not_fit_name_a_pair_that_does(base, data, recipe, changes, message):
    with pytest.raises((IncompatibleError, RecipeError), match=re.escape(message)):
        plan(base, data, recipe, *changes)
