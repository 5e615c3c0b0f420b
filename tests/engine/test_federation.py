"""Rounds: what a federation computes, and that nothing an interruption does can change it."""

import hashlib
import shutil

import pytest
import torch

from federating import CLIENTS, content, independent, plan, quiet
from kilotune.core.errors import FederationError, RunError, WireError
from kilotune.engine.afterwards import seedfile
from kilotune.engine.afterwards.measure import replay
from kilotune.engine.composing.compose import build
from kilotune.engine.flower.local import LocalExchange
from kilotune.engine.model.base import load_base
from kilotune.engine.rounds.federation import Federation
from kilotune.engine.rounds.ledger import Ledger
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rows.batches import micro_batches
from kilotune.engine.session import encode_rows, federate, header, split_rows
from kilotune.engine.training.step import BatchObjective
from tiny import save_tiny


@pytest.fixture(scope="module")
def undisturbed(base, data, tmp_path_factory):
    """Three rounds of the default recipe, nothing in the way."""
    folder = tmp_path_factory.mktemp("run") / "out"
    summary = federate(plan(base, data, "kilotune", "rounds=3", "threads=1"), folder, quiet)
    return folder, summary


def test_the_loss_falls_and_the_summary_keeps_its_contract(undisturbed):
    """Kills: a round that sends, adds and changes nothing."""
    _, summary = undisturbed
    assert summary["eval"]["after"]["loss"] < summary["eval"]["before"]["loss"]
    assert summary["rounds"] == 3
    assert summary["clients"] == 3
    for key in ("digest", "payload_up_bytes_per_client_round", "payload_down_bytes_per_client_round", "seconds"):
        assert summary[key]
    assert set(summary["eval"]["after"]) >= {"loss", "exact_match", "rouge_l", "num_examples"}


def test_equal_inputs_give_equal_digests_whatever_the_threads(base, data, tmp_path, undisturbed):
    """Kills: global random state; a reduction split by threads."""
    _, summary = undisturbed
    again = federate(plan(base, data, "kilotune", "rounds=3", "threads=2"), tmp_path / "run", quiet)
    assert again["digest"] == summary["digest"]


def test_one_round_of_one_full_batch_sgd_step_is_the_centralised_step(base, data, tmp_path):
    """Kills: wrong client weights, wrong signs, averaging gradients of unequal clients equally."""
    recipe = plan(
        base,
        data,
        "fedavg_full",
        "rounds=1",
        "local_steps=1",
        "batch_size=100",
        "optimizer={name: sgd, lr: 0.1}",
        "uplink={name: dense, dtype: fp32}",
        "downlink={name: dense, dtype: fp32}",
        "aggregation.weighting=equal",
    )
    summary = federate(recipe, tmp_path / "run", quiet)
    loaded = load_base(str(base), writable=True)
    rows = split_rows(recipe, alone=False)
    params = loaded.parameters()
    for param in params.values():
        param.requires_grad_(True)
    replica = Replica(loaded, recipe)
    total = torch.zeros(())
    for members in rows.clients.values():
        examples = encode_rows(recipe, loaded, members, "", quiet)
        objective = BatchObjective(
            loaded.model, micro_batches(examples, recipe.recipe, loaded.model, replica.base.tokenizer.pad_token_id)
        )
        total = total + sum(part() for part in objective.parts()) / len(rows.clients)
    grads = torch.autograd.grad(total, list(params.values()))
    run_base = load_base(str(base), writable=True)
    federated = Replica(run_base, recipe)
    federated.apply(1, Ledger.load(tmp_path / "run").payload(1))
    assert federated.digest() == summary["digest"]
    for (name, param), grad in zip(params.items(), grads, strict=True):
        expected = param.detach() - 0.1 * grad
        torch.testing.assert_close(run_base.parameters()[name].data, expected, atol=2e-6, rtol=2e-5)


class Killed(BaseException):
    """Stands for kill -9: no handler in the product catches it."""


MOMENTS = ("evaluation 0", "client 1", "commit 1", "client 2", "commit 2")


def test_a_run_killed_again_and_again_ends_with_the_digest_of_an_undisturbed_one(base, data, tmp_path, undisturbed):
    """Kills: state that is only in memory; state saved for a round that was never committed."""
    _, summary = undisturbed
    recipe = plan(base, data, "kilotune", "rounds=3", "threads=1")

    for moment in MOMENTS:
        what, at = moment.split()
        kind = "round" if what == "commit" else what

        def dying(event, kind=kind, at=int(at)):
            if event["event"] == kind and event.get("round") == at and event.get("client", "bob") == "bob":
                raise Killed

        with pytest.raises(Killed):
            federate(recipe, tmp_path / "run", dying)
    again = federate(recipe, tmp_path / "run", quiet)
    for key in ("digest", "ledger_head", "eval"):
        assert again[key] == summary[key], key


def test_error_feedback_and_moments_survive_a_kill(base, data, tmp_path):
    """Kills: residuals or optimizer state that restart from zero, or that advance twice for one round."""
    settings = [
        "rounds=3",
        "local_steps=1",
        "basis.refresh=run",
        "keep_optimizer=true",
        "server_optimizer={name: sgd, lr: 0.7, momentum: 0.5}",
    ]
    recipe = plan(base, data, "kilotune", *settings)
    whole = federate(recipe, tmp_path / "whole", quiet)

    def dying(event):
        if event["event"] == "client" and event.get("round") == 2 and event["client"] == "bob":
            raise Killed

    with pytest.raises(Killed):
        federate(recipe, tmp_path / "cut", dying)
    assert federate(recipe, tmp_path / "cut", quiet)["digest"] == whole["digest"]
    forgetful = [setting for setting in settings if not setting.startswith("keep_optimizer")]
    other = federate(plan(base, data, "kilotune", *forgetful), tmp_path / "forgetful", quiet)
    assert other["digest"] != whole["digest"]  # the moments really were in use, so a state without them would show


def test_replay_and_seed_file_rebuild_the_run_bit_for_bit(base, undisturbed):
    """Kills: a ledger that does not determine the weights."""
    folder, summary = undisturbed
    for source in (folder, folder / "final.seed"):
        result = replay(source, None, quiet)
        assert result["digest"] == summary["digest"]
        assert result["verified"] is True
        assert result["rounds"] == 3
    assert (folder / "final.seed").stat().st_size < 6000


def test_a_ledger_on_another_base_is_refused(tmp_path, undisturbed):
    """Kills: rebuilding on the wrong weights without a word."""
    folder, _ = undisturbed
    other = save_tiny(tmp_path / "other", seed=9)
    with pytest.raises(WireError, match="these rounds stand on"):
        replay(folder, str(other), quiet)


def test_another_recipe_or_a_second_process_in_the_same_folder_is_refused(base, data, tmp_path, undisturbed):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[0], folder)
    with pytest.raises(RunError, match="follows recipe"):
        federate(plan(base, data, "kilotune", "rounds=3", "optimizer.lr=0.5"), folder, quiet)


class Coming(LocalExchange):
    """Clients come and go: `present(round)` names who is there."""

    def __init__(self, workers, ledger, present):
        super().__init__({name: worker.handle for name, worker in workers.items()})
        self._ledger, self._present = ledger, present

    def roster(self):
        return [c for c in super().roster() if c in self._present(len(self._ledger) + 1)]

    def exchange(self, requests, deadline_s=None):
        here = self.roster()
        yield from super().exchange({c: r for c, r in requests.items() if c in here}, deadline_s)


def test_late_absent_and_faithful_clients_end_with_equal_weights(base, data, tmp_path):
    """A joins in round 4, B misses rounds 2-4, C was always there; by difference, by full replay, by checkpoint."""
    recipe = plan(base, data, "kilotune", "rounds=5", "local_steps=1")
    workers = {name: independent(name, recipe, base, tmp_path) for name in CLIENTS}
    loaded = load_base(str(base), writable=True)
    server = Replica(loaded, recipe)
    ledger = Ledger.open(tmp_path / "server", header(recipe, loaded))

    def present(number):
        late = {"ada"} if number >= 4 else set()
        absent = set() if 2 <= number <= 4 else {"bob"}
        return late | absent | {"cyd"}

    exchange = Coming(workers, ledger, present)
    Federation(recipe, server, ledger, exchange, tmp_path / "server", quiet).run()
    assert [len(r.contributions) for r in ledger.records] == [2, 1, 1, 2, 3]
    digests = {name: worker.replica.digest() for name, worker in workers.items()}
    assert set(digests.values()) == {server.digest()}
    restarted = independent("bob", recipe, base, tmp_path)  # full replay of what it kept
    assert restarted.round == 5
    assert restarted.replica.digest() == server.digest()
    replay(tmp_path / "server", None, quiet, tmp_path / "checkpoint.safetensors")
    newcomer = independent("ada", recipe, base, tmp_path / "new", tmp_path / "checkpoint.safetensors")
    assert (newcomer.round, newcomer.head) == (5, ledger.head)
    assert newcomer.replica.digest() == server.digest()


def test_a_client_with_another_recipe_or_base_is_refused_with_both_ids(base, data, tmp_path):
    recipe = plan(base, data, "kilotune")
    other = plan(base, data, "kilotune", "optimizer.lr=0.5")
    worker = independent("ada", other, base, tmp_path)
    loaded = load_base(str(base), writable=True)
    events = []
    ledger = Ledger(header(recipe, loaded))
    federation = Federation(
        recipe, Replica(loaded, recipe), ledger, LocalExchange({"ada": worker.handle}), tmp_path, events.append
    )
    with pytest.raises(FederationError, match="no client of 1 could join"):
        federation.run()
    (refusal,) = [e for e in events if e.get("status") == "refused"]
    assert recipe.id in refusal["why"]
    assert other.id in refusal["why"]


SPOILS = (lambda p: p[:-3], lambda p: b"XYZ1" + p[4:], lambda p: b"", lambda p: p + b"\0")


def test_a_cut_or_foreign_payload_is_refused_and_the_round_goes_on(base, data, tmp_path):
    """Kills: one bad client ending the run; a bad payload entering the mean."""
    from kilotune.engine.flower.messages import Reply

    recipe = plan(base, data, "kilotune", f"rounds={len(SPOILS)}", "local_steps=1")
    workers = {name: independent(name, recipe, base, tmp_path) for name in CLIENTS}
    loaded = load_base(str(base), writable=True)
    ledger = Ledger(header(recipe, loaded))

    def liar(request):
        reply = workers["bob"].handle(request)
        if request.kind != "train":
            return reply
        return Reply(reply.body, (SPOILS[request.body["round"] - 1](reply.payloads[0]),))

    handlers = {"ada": workers["ada"].handle, "bob": liar, "cyd": workers["cyd"].handle}
    events = []
    Federation(recipe, Replica(loaded, recipe), ledger, LocalExchange(handlers), tmp_path / "s", events.append).run()
    assert [[c.client for c in record.contributions] for record in ledger.records] == [["ada", "cyd"]] * len(SPOILS)
    refused = [(e["round"], e["client"]) for e in events if e.get("status") == "error"]
    assert refused == [(number, "bob") for number in range(1, len(SPOILS) + 1)]


def test_payloads_recorded_are_the_bytes_that_were_sent(undisturbed):
    """Kills: accounting by formula instead of len(payload)."""
    folder, summary = undisturbed
    ledger = Ledger.load(folder)
    down = sum(32 + len(ledger.payload(number)) for number in (1, 2, 3)) * 3
    assert summary["payload_down_bytes_per_client_round"] == pytest.approx(down / 9, abs=0.06)
    for contribution in ledger.records[0].contributions:
        assert len(contribution.payload_sha256) == len(hashlib.sha256().hexdigest())


def test_a_round_needs_min_clients(base, data, tmp_path):
    raw = content(base, data, "kilotune", "min_clients=4", "local_steps=1")
    with pytest.raises(FederationError, match="min_clients is 4"):
        federate(build(raw, "federate"), tmp_path / "run", quiet)
    assert seedfile.MAGIC == b"KTS1"
