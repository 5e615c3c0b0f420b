"""Tensors that stay with their client: shared ones average as two adapters trained by hand, own ones never travel."""

import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from federating import CLIENTS, plan, quiet
from kilotune.core.errors import IncompatibleError, RunError
from kilotune.core.rng import stream
from kilotune.core.types import TensorUpdate
from kilotune.engine.afterwards.measure import export
from kilotune.engine.afterwards.redo import CONTRIBUTIONS, Shelf
from kilotune.engine.model.base import load_base
from kilotune.engine.model.export import merged
from kilotune.engine.model.tuned import open_tuned
from kilotune.engine.rounds.book import read_entries
from kilotune.engine.rounds.clientstate import ClientState
from kilotune.engine.rounds.ledger import Ledger
from kilotune.engine.session import federate
from kilotune.engine.training.step import BatchObjective, Memory, train_step
from kilotune.estimator.backprop import Backprop
from kilotune.estimator.zeroth_order import ZerothOrder
from kilotune.optimizer.sgd import SGD
from kilotune.parametrization.dual_lora import DualLora
from tiny import tiny_batch, tiny_llama

METHOD, SCALE, LR = DualLora(rank=4, personal_rank=3), 2.0, 0.5


def attach():
    return METHOD.attach(tiny_llama(), basis=None, seed=3)


def batch(client, number, step):
    return tiny_batch(100 * client + 10 * number + step)


def through_the_parts(rounds):
    """(shared, own of each client): FedAvg of two clients that count alike."""
    trainable, kept = attach(), [{}, {}]
    for number in range(rounds):
        sent = []
        for client in (0, 1):
            trainable.begin(0)
            trainable.take_up(kept[client])
            for step in range(2):
                objective = BatchObjective(trainable.model, [batch(client, number, step)])
                train_step(trainable, Backprop(), SGD(lr=LR), objective, Memory.empty(), 1.0, stream(0))
            kept[client] = trainable.own()
            sent.append(trainable.update().tensors)
            trainable.rollback()
        trainable.apply(((name, (sent[0][name] + sent[1][name]) / 2) for name in sent[0]), 0)
    return trainable, kept


def by_hand(rounds):
    """The same with two adapters of peft, torch's own optimizer and transformers' own loss."""
    start = attach()
    shared = {name: value.clone() for name, value in start.wire.items()}
    start.take_up({})
    own = [start.own(), start.own()]
    config = [LoraConfig(r=r, lora_alpha=int(SCALE * r), target_modules="all-linear") for r in (4, 3)]
    model = get_peft_model(tiny_llama(), config[0])
    model.add_adapter("personal", config[1])
    model.base_model.set_adapter(["default", "personal"])
    params = {name: p for name, p in model.named_parameters() if "lora_" in name}
    for number in range(rounds):
        after = []
        for client in (0, 1):
            for name, param in params.items():
                param.data = (own[client] if "personal" in name else shared)[name].clone()
            for step in range(2):
                rows = batch(client, number, step)
                model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, labels=rows.labels).loss.backward()
                for param in params.values():
                    param.data -= LR * param.grad
                    param.grad = None
            own[client] = {name: params[name].data for name in own[client]}
            after.append({name: params[name].data for name in shared})
        shared = {name: (after[0][name] + after[1][name]) / 2 for name in shared}
    return shared, own


def test_two_rounds_of_two_clients_are_those_of_two_adapters_trained_by_hand():
    """Kills: own factors that restart, that are averaged or shared between clients; a gradient cut at the wrong rank; a
    factor of the wrong scale; a model that keeps a client's factors after its round. Bound: sums in another order."""
    trainable, kept = through_the_parts(2)
    shared, own = by_hand(2)
    assert trainable.wire.keys() == shared.keys()
    for name, value in trainable.state().items():
        torch.testing.assert_close(value, shared[name], rtol=1e-4, atol=2e-6)
        assert trainable.params[name].data_ptr() == trainable.wire[name].data_ptr()
    for found, expected in zip(kept, own, strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-6)
    assert any((kept[0][name] - kept[1][name]).abs().max() > 1e-3 for name in kept[0])


def test_a_forward_only_step_moves_both_adapters_and_rollback_leaves_the_shared_model():
    """Kills: probes that move the shared factors alone; a probe that is left in the adapter."""
    trainable = attach()
    before = {name: value.clone() for name, value in trainable.wire.items()}
    trainable.begin(0, forward_only=True)
    trainable.take_up({})
    start = trainable.own()
    objective = BatchObjective(trainable.model, [tiny_batch(1)])
    train_step(trainable, ZerothOrder(epsilon=1e-2), SGD(lr=1e-3), objective, Memory.empty(), 1.0, stream(0))
    for name, place in trainable._places.items():
        assert torch.equal(place, trainable.wire[name])
    assert all(not torch.equal(start[name], value) for name, value in trainable.own().items())
    assert all(change.any() for change in trainable.update().tensors.values())
    trainable.rollback()
    assert all(torch.equal(trainable.params[name], value) for name, value in before.items())
    assert isinstance(trainable.update(), TensorUpdate)
    assert not trainable.own()


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.fixture(scope="module")
def run(base, data, tmp_path_factory):
    """(recipe, folder of two undisturbed rounds, folder of two that were cut in the second)."""
    folder = tmp_path_factory.mktemp("dual")
    recipe = plan(base, data, "dual_lora", "batch_size=2", "evaluation.limit=1", "keep_contributions=always")
    federate(recipe, folder / "whole", quiet)

    def dying(event):
        if event["event"] == "client" and event.get("round") == 2 and event["client"] == "bob":
            raise Killed

    with pytest.raises(Killed):
        federate(recipe, folder / "cut", dying)
    federate(recipe, folder / "cut", quiet)
    return recipe, folder / "whole", folder / "cut"


def own_of(folder, client):
    return ClientState(folder / "clients" / client).before(3)[0].weights


def test_own_adapters_differ_between_clients_and_survive_a_kill(run):
    """Kills: an adapter that restarts with its process or with every round, or trains twice for one; one that all
    simulated clients share. In one round's two steps AdamW moves no number farther than 2 lr = 0.002 from its start."""
    _, whole, cut = run
    assert Ledger.load(whole).head == Ledger.load(cut).head
    kept = {client: own_of(whole, client) for client in CLIENTS}
    for client in CLIENTS:
        assert kept[client].keys() == own_of(cut, client).keys()
        assert all(torch.equal(value, own_of(cut, client)[name]) for name, value in kept[client].items())
    names = [name for name in kept["ada"] if ".lora_B." in name]
    assert len(names) == 14
    for name in names:
        assert kept["ada"][name].abs().max() > 0.0025
        assert not torch.equal(kept["ada"][name], kept["bob"][name])


def test_no_byte_of_an_own_adapter_is_in_a_payload(run):
    """Kills: own factors that are encoded with the shared ones, under their name or within a longer factor."""
    recipe, whole, _ = run
    shapes = open_tuned(str(whole)).replica.shapes
    dense = recipe.uplink.predict_bytes({name: torch.Size(shape).numel() for name, shape in shapes.items()}, 0)
    shelf, ledger = Shelf(whole / CONTRIBUTIONS, "always"), Ledger.load(whole)
    payloads = [payload for _, payload in ledger.since(0)]
    payloads += [entry.payload for record in ledger.records for entry, _ in read_entries(shelf.path(record.round))]
    assert len(payloads) == 2 + 2 * len(CLIENTS)
    assert not [name for name in shapes if "personal" in name]
    for payload in payloads:
        assert len(payload) == dense
    kept = [value for client in CLIENTS for value in own_of(whole, client).values()]
    assert len(kept) == 28 * len(CLIENTS)
    for value in kept:
        raw = value.half().numpy().tobytes()[:32]
        assert not any(raw in payload for payload in payloads)


def test_a_client_exports_its_own_model_and_merging_keeps_its_logits(base, run, tmp_path):
    """Kills: an export of the shared adapter; an adapter folder that says another rank or scale than it has."""
    _, whole, _ = run
    export(str(whole), tmp_path / "ada", "peft", None, quiet, whole / "clients" / "ada")
    tuned = open_tuned(str(whole), None, whole / "clients" / "ada")
    tokens = torch.arange(1, 13)[None]
    expected = tuned.model(input_ids=tokens).logits
    again = PeftModel.from_pretrained(load_base(str(base)).model, str(tmp_path / "ada"))
    torch.testing.assert_close(again(input_ids=tokens).logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged(tuned.model)(input_ids=tokens).logits, expected, rtol=0, atol=1e-5)
    shared = open_tuned(str(whole)).model(input_ids=tokens).logits
    assert (shared - expected).abs().max() > 1e-4


def test_a_folder_without_own_tensors_of_this_run_is_refused(run, tmp_path):
    _, whole, _ = run
    with pytest.raises(RunError, match="holds no state of a client in this run"):
        open_tuned(str(whole), None, tmp_path)
    with pytest.raises(RunError, match="is no run of several clients"):
        open_tuned(str(open_tuned(str(whole)).base.path), None, whole / "clients" / "ada")


@pytest.mark.parametrize(
    ("recipe", "change", "message"),
    [
        ("dual_lora", "streaming.mixing=0.5", "streaming goes on from a client's own weights"),
        ("local_lora", "parametrization={name: dual_lora}", "'dual_lora' is for rounds of several clients"),
    ],
)
def test_parts_that_do_not_go_with_own_tensors_are_refused(base, data, recipe, change, message):
    with pytest.raises(IncompatibleError, match=re.escape(message)):
        plan(base, data, recipe, change)
