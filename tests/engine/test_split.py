"""Clients without the body of the model: what they compute, keep and send, against the whole model in one piece."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from federating import CLIENTS, content, plan, quiet
from kilotune.core.errors import IncompatibleError, RecipeError, WireError
from kilotune.engine.composing.compose import build
from kilotune.engine.deployed import join, serve
from kilotune.engine.model.base import load_base, weights_digest
from kilotune.engine.model.loss import answer_loss
from kilotune.engine.model.tuned import open_tuned
from kilotune.engine.partial.split import batch_bytes, kept_count
from kilotune.engine.partial.splitbody import ServerBody, blocks_between, pack, rows_message, unpack
from kilotune.engine.partial.splitclient import SplitClient
from kilotune.engine.planning.planner import payload_bytes
from kilotune.engine.rounds.federation import Federation
from kilotune.engine.rounds.ledger import MEMBERS_BYTES
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.session import encode_rows, federate, split_rows
from kilotune.parametrization.prompt_tail import PromptTail
from tiny import tiny_batch, tiny_llama

LAYERS, PROMPTS, WIDTH = 4, 3, 32


def whole(seed=0):
    """A model of four blocks with prompts and a tail of one whose pairs are not zero."""
    model = tiny_llama(seed, num_hidden_layers=LAYERS)
    trainable = PromptTail(prompts=PROMPTS, tail=1, rank=2, spread=0.5).attach(model, basis=None, seed=7)
    generator = torch.Generator().manual_seed(5)
    for name, value in trainable.wire.items():
        if "lora_B" in name:
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return trainable


def settings(lower=1, tail=1, dtype="fp32", **changes):
    split = SimpleNamespace(lower=lower, dtype=dtype)
    recipe = SimpleNamespace(split=split, precision="fp32", checkpointing=changes.get("checkpointing", 0.0))
    return SimpleNamespace(recipe=recipe, parametrization=SimpleNamespace(tail=tail))


def batch():
    """Rows of several lengths, with the numbers of their examples."""
    made = tiny_batch(3, rows=4, tokens=12)
    numbers = torch.arange(4)[:, None].expand(4, 12).clone()
    numbers[made.attention_mask == 0] = -1
    return type(made)(made.input_ids, made.labels, made.attention_mask, numbers)


def gradients(trainable, loss):
    sources = trainable.sources()
    for param in sources.values():
        param.requires_grad_(True)
    value = loss()
    found = torch.autograd.grad(value, list(sources.values()))
    for param in sources.values():
        param.requires_grad_(False)
    return value.detach(), dict(zip(sources, found, strict=True))


class Watched:
    """A body that notes the sizes of all messages."""

    def __init__(self, body):
        self.body, self.sizes = body, []

    def forward(self, message):
        answer = self.body.forward(message)
        self.sizes += [len(message), len(answer)]
        return answer

    def backward(self, message):
        answer = self.body.backward(message)
        self.sizes += [len(message), len(answer)]
        return answer


def body_of(trainable, lower, dtype="fp32"):
    """The server's end over another model's blocks."""
    from kilotune.codec.dense import Dense
    from kilotune.engine.model.compute import Compute

    decoder = trainable.model.get_base_model().get_decoder()
    return Watched(ServerBody(blocks_between(decoder, lower, LAYERS - 1), WIDTH, Dense(dtype=dtype), Compute()))


@pytest.mark.parametrize(("lower", "checkpointing"), [(0, 0.0), (2, 1.0)])
def test_gradients_through_the_split_are_those_of_the_whole_model_even_where_the_client_has_no_body(
    lower, checkpointing
):
    """Card, property 1, and memory. Kills: positions that do not count the prompts; padding that is seen; a gradient
    that stops at a cut; a client that computes with a block of the body (here NaN) or with the server's model."""
    monolith, client_side, rows = whole(), whole(), batch()
    client = SplitClient(settings(lower, checkpointing=checkpointing), client_side.model, body_of(whole(), lower))
    for block in client_side.model.get_base_model().get_decoder().layers[lower : LAYERS - 1]:
        for param in block.parameters():
            param.data.fill_(math.nan)
    loss, expected = gradients(monolith, lambda: answer_loss(monolith.model, rows, "sum"))
    split_loss, found = gradients(client_side, lambda: client.loss(rows, shortcut=False))
    torch.testing.assert_close(split_loss, loss, atol=1e-5, rtol=1e-5)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(found[name] / scale, gradient / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "each"), [("fp32", 4), ("bf16", 2)])
def test_a_batch_costs_four_messages_of_a_number_per_token_and_unit_of_width(dtype, each):
    """Card, property 4: 4·T·h·b bytes per row, prompts counted, padding not. Kills: padding on the wire; a header that
    is not counted; numbers of another width; a shortcut that sends."""
    trainable, rows = whole(), batch()
    body = body_of(trainable, 1, dtype)
    client = SplitClient(settings(dtype=dtype), trainable.model, body)
    gradients(trainable, lambda: client.loss(rows, shortcut=True))
    assert not body.sizes
    loss, _ = gradients(trainable, lambda: client.loss(rows, shortcut=False))
    lengths = (rows.attention_mask.sum(1) + PROMPTS).tolist()
    frames = 4 * 17 + 8 + 4 * len(lengths)
    assert sum(body.sizes) == sum(4 * length * WIDTH * each for length in lengths) + frames
    up, down = batch_bytes(len(lengths), sum(lengths), WIDTH, each)
    assert (up, down) == (body.sizes[0] + body.sizes[2], body.sizes[1] + body.sizes[3])
    told = client.facts()
    assert (told["activation_up_bytes"], told["activation_down_bytes"]) == (up, down)
    exact = float(answer_loss(trainable.model, rows, "sum"))
    assert abs(float(loss) / exact - 1) < (1e-6 if dtype == "fp32" else 2e-2)
    assert (dtype == "fp32") or float(loss) != pytest.approx(exact, rel=1e-6)  # short numbers have their real effect


def test_the_rows_that_are_kept_are_exactly_those_with_the_largest_el2n(base, data):
    """Card, property 3. Kills: easy rows kept; another count by rounding; a score over prompts, padding or question; a
    score through the body."""
    recipe = plan(base, data, "sfprompt")
    loaded = load_base(str(base))
    replica = Replica(loaded, recipe)
    rows = encode_rows(recipe, loaded, split_rows(recipe, alone=False).clients["ada"], "ada", quiet)
    body = Watched(None)
    client = SplitClient(recipe, replica.model, body)
    model = replica.model.get_base_model()
    vectors, head = model.model.prompts.weight, model.lm_head
    model.model.layers = model.model.layers[1:]  # the shortcut as a model of its own
    model.config.num_hidden_layers = 1
    plainly = []
    for row in rows:
        tokens = torch.tensor(row.input_ids[None], dtype=torch.int64)
        logits = head(model.model(input_ids=tokens, use_cache=False).last_hidden_state)[0]
        answer = [t for t in range(1, len(row.labels)) if row.labels[t] != -100]
        errors = [logits[t - 1].softmax(-1) - torch.eye(300)[int(row.labels[t])] for t in answer]
        plainly.append(float(torch.stack(errors).double().norm(dim=1).mean()))
    np.testing.assert_allclose(client.scores(rows, 64), plainly, rtol=1e-5)
    kept = client.kept(rows, 0.5, 64)
    assert len(rows) == 9
    assert len(vectors) == 5
    assert kept == sorted(sorted(range(9), key=lambda i: -plainly[i])[:5])
    assert body.sizes == []
    assert [kept_count(n, keep) for n, keep in ((9, 0.5), (100, 0.07), (1, 0.01), (8, 1.0))] == [5, 7, 1, 8]


def learnable(folder):
    """Rows with one answer for all of them."""
    rows = [
        {
            "client": c,
            "instruction": f"{c} {n}",
            "input": "",
            "output": "on",
            "split": "test" if n % 4 == 3 else "train",
        }
        for c in CLIENTS
        for n in range(8)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rounds_lower_the_loss_of_the_whole_model_leave_the_base_and_count_every_message(base, tmp_path, monkeypatch):
    """Card, property 2. Kills: a body or base that is trained; a server that measures without the body; messages left
    out of the record of a client, a round, the run, or a run that was killed and goes on."""
    recipe = plan(base, learnable(tmp_path), "sfprompt", "local_steps=3", "split.shortcut_steps=1", "optimizer.lr=3e-2")
    replicas, events, run = [], [], Federation.run
    monkeypatch.setattr(Federation, "run", lambda self: replicas.append(self.replica) or run(self))

    class Killed(BaseException):
        pass

    def dying(event):
        if event["event"] == "client" and event["round"] == 2:
            raise Killed
        events.append(event)

    with pytest.raises(Killed):
        federate(recipe, tmp_path / "run", dying)
    summary = federate(recipe, tmp_path / "run", events.append)
    assert summary["eval"]["after"]["loss"] < 0.7 * summary["eval"]["before"]["loss"]
    assert [weights_digest(r.base.parameters()) for r in replicas] == [summary["base_digest"]] * 2
    assert open_tuned(str(tmp_path / "run")).replica.digest() == summary["digest"] == replicas[1].digest()
    told, rounds = ([e for e in events if e["event"] == kind] for kind in ("client", "round"))
    payload = recipe.uplink.predict_bytes({name: math.prod(shape) for name, shape in replicas[0].shapes.items()}, 0)
    assert len(told) == 6
    for event in told:
        assert event["up_bytes"] == payload + event["activation_up_bytes"]
        assert event["activation_up_bytes"] > event["activation_down_bytes"] > 0
    assert sum(e["up_bytes"] for e in rounds) == sum(e["up_bytes"] for e in told)
    assert summary["payload_up_bytes_per_client_round"] == round(sum(e["up_bytes"] for e in told) / 6, 1)
    owed = next(e["down_bytes"] for e in events if e["event"] == "finishing")
    sent = sum(e["down_bytes"] for e in rounds) + owed
    assert summary["payload_down_bytes_per_client_round"] == round(sent / 6, 1)
    records = 2 * 3 * (MEMBERS_BYTES + payload)  # of two rounds for three clients, as large as what they sent
    assert sent == records + sum(e["activation_down_bytes"] for e in told)
    assert any("as good as the text itself" in e["text"] for e in events if e["event"] == "warning")


def test_a_federation_through_the_split_is_one_of_clients_that_hold_the_model(base, data, tmp_path):
    """All rows, no shortcut, numbers whole: nothing but the place of the body differs. Kills: steps on other batches; a
    shortcut that is taken unasked; a loss of another scale."""
    common = ("split.keep=1", "split.shortcut_steps=0", "split.dtype=fp32", "local_steps=1", "optimizer.lr=1e-2")
    through, without = (
        federate(plan(base, data, "sfprompt", *common, more), tmp_path / more, quiet)
        for more in ("split.enabled=true", "split.enabled=false")
    )
    assert through["eval"]["after"]["loss"] == pytest.approx(without["eval"]["after"]["loss"], rel=1e-5)
    assert through["eval"]["after"]["loss"] != through["eval"]["before"]["loss"]


def test_a_prediction_from_known_lengths_is_what_rows_of_them_cost(base, data):
    """Kills: one direction forgotten; prompts left out of a row."""
    recipe = plan(base, data, "sfprompt", "batch_size=1")
    numel = {"prompts": 5 * WIDTH}
    got = payload_bytes(recipe, numel, 3, row=20.0)
    without = payload_bytes(plan(base, data, "sfprompt", "batch_size=1", "split.enabled=false"), numel, 3)
    steps = recipe.recipe.local_steps
    for way, frame in (("up", 2 * 17 + 8 + 4), ("down", 2 * 17)):
        key = f"payload_{way}_bytes_per_client_round"
        assert got[key] - without[key] == pytest.approx(steps * (2 * 25 * WIDTH * 2 + frame))


def test_planned_numbers_of_a_tail_are_those_that_are_attached(base):
    """Kills: counting pairs in every block."""
    model = tiny_llama(num_hidden_layers=LAYERS)
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    method = PromptTail(prompts=PROMPTS, tail=2, rank=4)
    wire = method.attach(model, basis=None, seed=0).wire
    assert sum(method.numbers(shapes, WIDTH).values()) == sum(value.numel() for value in wire.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("parametrization={name: peft}",), "Use parametrization: prompt_tail"),
        (("estimator={name: zeroth_order}",), "Use estimator: backprop"),
        (("secure_aggregation.enabled=true",), "privacy and secure_aggregation do not hide"),
        (("streaming.mixing=0.5",), "has steps that are not a round's"),
        (("emulator.right=1",), "Use it without emulator and arms"),
    ],
)
def test_what_does_not_go_with_a_split_is_refused_with_what_does(base, data, changes, message):
    with pytest.raises(IncompatibleError, match=message):
        build(content(base, data, "sfprompt", *changes, "defences.enabled=false"), "federate")


def test_cuts_that_leave_the_server_no_block_are_refused_before_the_first_round(base, data, tmp_path):
    trainable = whole()
    for lower, tail in ((3, 1), (9, 1), (0, 4), (0, 5)):
        with pytest.raises(RecipeError, match="expected fewer than the base's 4 blocks in all"):
            SplitClient(settings(lower, tail), trainable.model)
    with pytest.raises(RecipeError, match="expected fewer than the base's 2 blocks in all"):
        federate(plan(base, data, "sfprompt", "split.lower=1"), tmp_path / "run", quiet)


def test_machines_of_their_own_are_refused_in_one_line_that_names_the_simulation(base, data, tmp_path):
    recipe = plan(base, data, "sfprompt")
    for start in (
        lambda: serve(recipe, tmp_path, tmp_path / "a", 0, quiet),
        lambda: join(recipe, tmp_path, tmp_path / "b", 0.0, None, quiet),
    ):
        with pytest.raises(RecipeError, match="Use `kilotune federate`"):
            start()


def test_a_message_that_is_cut_foreign_or_huge_is_refused():
    """Kills: a body that takes memory, or crashes, by what a message claims."""
    from kilotune.codec.dense import Dense

    body, codec = body_of(whole(), 1).body, Dense(dtype="fp32")
    good = rows_message([2, 3]) + pack(torch.ones(2, 3, WIDTH), [2, 3], codec)
    foreign = (b"", good[:6], good[:-1], b"ROW2" + good[4:], rows_message([2, 4]) + good[16:], rows_message([1 << 31]))
    for message in (*foreign, rows_message([0]), rows_message([])):
        with pytest.raises(WireError):
            body.forward(message)
    answer = body.forward(good)
    assert unpack(answer, [2, 3], WIDTH, codec)[0, 2].eq(0).all()
    body.backward(answer)
    with pytest.raises(WireError, match="no batch is under way"):
        body.backward(answer)
