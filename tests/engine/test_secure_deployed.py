"""Secure aggregation between processes over TLS: the weights of the simulated run, also when a client is killed."""

import pytest

from engine.test_deployed import SETTINGS, Deployment, run
from federating import CLIENTS, plan, quiet
from kilotune.engine.session import federate

pytestmark = pytest.mark.processes

MASKED = ["secure_aggregation.enabled=true", "defences.enabled=false", "keep_contributions=never", "rounds=3"]


class Masked(Deployment):
    """The recipe of the other deployed tests under masks."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.settings += MASKED


def test_masked_processes_end_where_the_masked_simulation_ends(base, data, tmp_path, monkeypatch):
    """Kills: message kinds that only pass in process; size limits that refuse masked vectors; losses on the wire."""
    monkeypatch.setattr("engine.test_deployed.Deployment", Masked)
    simulated = federate(plan(base, data, "kilotune", *SETTINGS, *MASKED), tmp_path / "one", quiet)
    said = []
    summary = run(tmp_path, base, data, lambda deployment, event: said.append(event))
    assert summary["digest"] == simulated["digest"]
    assert summary["client_digests"] == dict.fromkeys(CLIENTS, summary["digest"])
    told = [event for event in said if event["event"] == "client" and event.get("status") == "ok"]
    assert len(told) == 9
    assert not any("loss" in event or "num_examples" in event for event in told)


def test_a_killed_client_is_dropped_and_the_others_go_on(base, data, tmp_path, monkeypatch):
    """Kills: a round that waits for secrets that are gone; a client that cannot come back."""
    monkeypatch.setattr("engine.test_deployed.Deployment", Masked)
    killed = []

    def watch(deployment: Deployment, event: dict) -> None:
        if event["event"] == "round" and event["round"] == 1 and not killed:
            killed.append("bob")
            deployment.kill("bob")
            deployment.start("bob")

    summary = run(tmp_path, base, data, watch)
    assert killed and summary["rounds"] == 3
    assert summary["client_digests"] == dict.fromkeys(CLIENTS, summary["digest"])
