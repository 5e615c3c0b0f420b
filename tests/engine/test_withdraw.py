"""Withdrawal: the rounds without one client, against sums made by hand and against a run that never had it."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch

from federating import plan, quiet, write_rows
from kilotune.core.errors import IncompatibleError, RunError, WireError
from kilotune.core.types import SeedUpdate, TensorUpdate
from kilotune.engine.afterwards.measure import replay
from kilotune.engine.afterwards.seedfile import read as read_seed_file
from kilotune.engine.afterwards.withdraw import verify, withdraw
from kilotune.engine.afterwards.withdrawn import exclude, withdrawn
from kilotune.engine.flower.keys import init_server
from kilotune.engine.model.base import load_base
from kilotune.engine.rounds.book import Book
from kilotune.engine.rounds.ledger import LEDGER, Ledger
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.session import federate
from lying import prepared, times

QUICK = ("local_steps=1", "batch_size=2", "evaluation.limit=3")
PAIRS = ("optimizer={name: sgd, lr: 0.01}",)


def content(folder) -> dict[str, str]:
    """Every file of a folder, as its hash."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def taken_out(run, output, how="subtract", client="bob", keys=None):
    return withdraw(run, client, output, how, keys, None, quiet)


@pytest.mark.parametrize(
    ("recipe", "liar"),
    [("kilotune", True), ("fedkseed_pro", True), ("fedavg_lora", False), ("robust_coefficients", True)],
)
def test_one_round_without_a_client_is_the_round_of_a_federation_that_never_had_it(base, data, tmp_path, recipe, liar):
    """Kills: weights that are not shared out anew; bounds of the others that still follow the client who left."""
    settings = ("rounds=1", *QUICK, *(PAIRS if "fedkseed" in recipe else ()))
    if recipe == "robust_coefficients":  # of so few clients multi-Krum makes a plain mean
        settings += ("aggregation={name: geometric_median, weighting: equal}",)
    lies = {"bob": times(30.0)} if liar else {}
    prepared(plan(base, data, recipe, *settings), tmp_path / "run", lies).run()
    two = write_rows(tmp_path / "two.jsonl")
    two.write_text("".join(line for line in two.open() if '"bob"' not in line))
    federate(plan(base, two, recipe, *settings), tmp_path / "without", quiet)
    result = taken_out(tmp_path / "run", tmp_path / "new")
    assert result["new"]["head"] == Ledger.load(tmp_path / "without").head
    assert result["new"]["digest"] == replay(tmp_path / "without", None, quiet)["digest"]
    assert result["new"]["digest"] != result["old"]["digest"]


def by_hand(recipe, replica, record, sent) -> bytes:
    """The round as float64 sums in NumPy over what the others sent."""
    context = replica.context(record.round)
    others = [part for part in record.contributions if part.client != "bob"]
    updates = [recipe.uplink.decode(sent[part.client], context) for part in others]
    rows = np.array([part.num_examples for part in others], dtype=np.float64)
    if isinstance(updates[0], SeedUpdate):
        total = np.zeros(recipe.num_directions)
        for update, weight in zip(updates, rows / rows.sum(), strict=True):
            np.add.at(total, update.indices, weight * update.coefs.astype(np.float64))
        named = np.flatnonzero(total)
        return recipe.downlink.encode(SeedUpdate(named, total[named].astype(np.float32)), context, {})
    mean = {
        name: sum(n * u.tensors[name].double().numpy() for n, u in zip(rows, updates, strict=True)) / rows.sum()
        for name in replica.shapes
    }
    update = TensorUpdate({name: torch.from_numpy(value.astype(np.float32)) for name, value in mean.items()})
    return recipe.downlink.encode(update, context, {})


@pytest.mark.parametrize("name", ["kilotune", "fedkseed", "fedavg_lora"])
def test_every_round_of_the_new_run_is_the_weighted_mean_of_the_others(base, data, tmp_path, name):
    """Kills: a share subtracted after quantization; a round that was forgotten; weights that do not sum to 1."""
    settings = (*PAIRS, "defences.enabled=false") if name == "fedkseed" else ("defences.enabled=false",)
    recipe = plan(base, data, name, *QUICK, *settings)
    federate(recipe, tmp_path / "run", quiet)
    before = content(tmp_path / "run")
    result = taken_out(tmp_path / "run", tmp_path / "new")
    assert content(tmp_path / "run") == before
    old, new = Ledger.load(tmp_path / "run"), Ledger.load(tmp_path / "new")
    replica = Replica(load_base(str(base)), recipe)
    book = Book(tmp_path / "run" / "contributions")
    for was, now in zip(old.records, new.records, strict=True):
        sent = {entry.client: entry.payload for entry in book.entries(was.round)}
        assert new.payload(now.round) == by_hand(recipe, replica, was, sent)
        assert [part.client for part in now.contributions] == ["ada", "cyd"]
        assert [part.weight for part in now.contributions] == [0.5, 0.5]
        assert b"bob" not in (tmp_path / "new" / "contributions" / f"{now.round:05d}.bin").read_bytes()
    assert result["removed"] == [
        {"round": record.round, **plain(part)}
        for record in old.records
        for part in record.contributions
        if part.client == "bob"
    ]
    assert result["new"]["digest"] == replay(tmp_path / "new", None, quiet)["digest"]
    if recipe.basis is not None:
        assert read_seed_file(tmp_path / "new" / "final.seed").head == new.head


def plain(part) -> dict:
    keys = ("num_examples", "weight", "payload_sha256", "scale", "limit")
    return {key: getattr(part, key) for key in keys}


def test_two_clients_can_leave_one_after_the_other_and_all_of_them(base, data, tmp_path):
    """Kills: a new run that nobody can leave; a round without anybody that still moves the weights."""
    federate(plan(base, data, "kilotune", "rounds=1", *QUICK), tmp_path / "0", quiet)
    for number, client in enumerate(("bob", "ada", "cyd")):
        result = taken_out(tmp_path / str(number), tmp_path / str(number + 1), client=client)
    assert withdrawn(tmp_path / "3") == {"ada", "bob", "cyd"}
    assert len(list((tmp_path / "3").glob("withdrawal-*.json"))) == 3
    fresh = Replica(load_base(str(base)), plan(base, data, "kilotune", *QUICK))
    assert result["new"]["digest"] == fresh.digest()


def test_a_run_taken_back_to_its_start_goes_on_as_if_the_client_had_never_been_there(base, data, tmp_path):
    """Kills: a client that takes part again; memory of rounds that were taken back."""
    recipe = plan(base, data, "kilotune", *QUICK)
    federate(recipe, tmp_path / "run", quiet)
    two = write_rows(tmp_path / "two.jsonl")
    two.write_text("".join(line for line in two.open() if '"bob"' not in line))
    never = federate(plan(base, two, "kilotune", *QUICK), tmp_path / "never", quiet)
    result = taken_out(tmp_path / "run", tmp_path / "new", "replay")
    assert (result["rounds"], result["rounds_kept"]) == (0, 0)
    assert federate(recipe, tmp_path / "new", quiet)["ledger_head"] == never["ledger_head"]
    verify(tmp_path / "new" / "withdrawal-001.json", tmp_path / "new", None, None, quiet)


def test_rounds_before_the_clients_first_are_kept_bit_for_bit(base, data, tmp_path):
    """Kills: one round too many or too few; a resumed run that does not remember what its server did."""
    settings = (
        "rounds=4",
        *QUICK,
        "schedule={name: uniform, clients_per_round: 1}",
        "basis.refresh=run",
        "seed=1",
    )
    recipe = plan(base, data, "kilotune", *settings)
    federate(recipe, tmp_path / "run", quiet)
    old = Ledger.load(tmp_path / "run")
    order = [record.contributions[0].client for record in old.records]
    late = max(set(order), key=order.index)
    first = order.index(late)
    assert first > 0, order
    result = taken_out(tmp_path / "run", tmp_path / "new", "replay", late)
    new = Ledger.load(tmp_path / "new")
    assert new.records == old.records[:first]
    assert result["rounds_kept"] == first
    summary = federate(recipe, tmp_path / "new", quiet)
    names = [part.client for record in Ledger.load(tmp_path / "new").records for part in record.contributions]
    assert len(names) == 4
    assert late not in names
    assert summary["rounds"] == 4
    text = (tmp_path / "new" / "metrics.jsonl").read_text()
    events = [json.loads(line) for line in text.splitlines()]
    assert not any(event.get("client") == late for event in events if event["event"] == "client")


def test_a_server_at_work_asks_who_is_excluded_no_more(base, data, tmp_path):
    """Kills: an exclusion that takes effect at the next start only."""

    def leaving(event):
        if event["event"] == "round" and event["round"] == 1:
            exclude(tmp_path, "bob")

    federation = prepared(plan(base, data, "kilotune", "rounds=3", *QUICK), tmp_path, emit=leaving)
    federation.run()
    assert [client for number, client in federation.exchange.asked if number > 1] == ["ada", "cyd"] * 2


# -- what cannot be taken out -----------------------------------------------------------------------------------------


def test_contributions_that_are_not_there_or_not_what_counted_are_named(base, data, tmp_path):
    federate(plan(base, data, "kilotune", *QUICK), tmp_path / "run", quiet)
    with pytest.raises(RunError, match="got client 'bobby', expected one of ada, bob, cyd"):
        taken_out(tmp_path / "run", tmp_path / "new", client="bobby")
    path = tmp_path / "run" / "contributions" / "00002.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    with pytest.raises(WireError, match="round 2: the payload of client 'cyd' is missing or cut"):
        taken_out(tmp_path / "run", tmp_path / "new")
    path.unlink()
    with pytest.raises(RunError, match="keep_contributions: always"):
        taken_out(tmp_path / "run", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".new*"))
    path.write_bytes(raw)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").write_text("x")
    with pytest.raises(RunError, match="something already"):
        taken_out(tmp_path / "run", tmp_path / "new")


def test_runs_that_hide_single_updates_are_refused_with_what_can_be_done(base, data, tmp_path):
    private = plan(base, data, "private_central", "privacy.clients=3", "rounds=1", *QUICK)
    federate(private, tmp_path / "private", quiet)
    with pytest.raises(IncompatibleError, match="names nobody"):
        taken_out(tmp_path / "private", tmp_path / "new")
    federate(plan(base, data, "secure", "rounds=1", *QUICK), tmp_path / "secure", quiet)
    with pytest.raises(IncompatibleError, match="Use --how replay"):
        taken_out(tmp_path / "secure", tmp_path / "new")
    assert taken_out(tmp_path / "secure", tmp_path / "new", "replay")["rounds"] == 0


# -- certificate ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certified(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("certified")
    federate(plan(base, data, "kilotune", *QUICK), folder / "run", quiet)
    init_server(folder / "keys", "127.0.0.1", 8443, ["bob"])
    return folder, taken_out(folder / "run", folder / "new", keys=folder / "keys")


def test_a_certificate_fits_its_run_and_the_servers_key(certified):
    folder, result = certified
    found = verify(folder / "new" / "withdrawal-001.json", folder / "new", result["fingerprint"], None, quiet)
    assert found["checked"] == ["signature", "signer", "head", "digest", "base", "absence of the client"]
    assert found["signer"].startswith("server of federation")
    with pytest.raises(WireError, match="expected 00"):
        verify(folder / "new" / "withdrawal-001.json", None, "00" * 32, None, quiet)
    with pytest.raises(WireError, match="another run"):
        verify(folder / "new" / "withdrawal-001.json", folder / "run", None, None, quiet)


def test_every_changed_byte_of_a_certificate_is_refused(certified, tmp_path):
    """Kills: a field the signature does not cover; a key that may be exchanged; a field added."""
    folder, _ = certified
    raw = (folder / "new" / "withdrawal-001.json").read_bytes()
    path = tmp_path / "changed.json"
    for place in range(0, len(raw), 7):
        changed = bytearray(raw)
        changed[place] ^= 1
        path.write_bytes(bytes(changed))
        try:
            verify(path, None, None, None, quiet)
        except WireError:
            continue
        assert json.loads(bytes(changed)) == json.loads(raw), place  # white space, or the case of a hex digit
    fields = json.loads(raw)
    path.write_text(json.dumps({**fields, "note": "all is well"}))
    with pytest.raises(WireError, match="added or removed"):
        verify(path, None, None, None, quiet)


def test_a_run_that_still_holds_the_client_does_not_fit(certified, tmp_path):
    folder, _ = certified
    shutil.copytree(folder / "new", tmp_path / "new")
    held = (folder / "run" / "contributions" / "00001.bin").read_bytes()
    (tmp_path / "new" / "contributions" / "00001.bin").write_bytes(held)
    with pytest.raises(WireError, match="still holds what client 'bob' sent"):
        verify(folder / "new" / "withdrawal-001.json", tmp_path / "new", None, None, quiet)
    assert (tmp_path / "new" / LEDGER).exists()
