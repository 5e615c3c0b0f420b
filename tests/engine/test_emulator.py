"""The emulator: ends trained around a thinned middle, and put back into the full model by name."""

import hashlib
import weakref
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from federating import content, deeper, independent, plan, quiet
from kilotune.core.errors import ModelError, RecipeError, RunError
from kilotune.engine.composing.compose import build
from kilotune.engine.composing.recipe import EmulatorSection
from kilotune.engine.flower.local import LocalExchange
from kilotune.engine.flower.messages import Request
from kilotune.engine.model.base import load_base
from kilotune.engine.model.tuned import open_tuned
from kilotune.engine.partial.alignment import align, load_aligned
from kilotune.engine.partial.emulator import BLOCK, layout, require_deployable, thinned, unread
from kilotune.engine.planning.facts import read_facts
from kilotune.engine.planning.planner import payload_bytes, wire_numbers
from kilotune.engine.planning.slices import LARGE, SMALL, _Slice
from kilotune.engine.rounds.ledger import Ledger
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rows.shares import split_rows
from kilotune.engine.session import encode_rows, evaluator, federate

TOKENS = torch.arange(3, 19).reshape(2, 8)
SMALLER = ("batch_size=2", "evaluation.limit=3")


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS, use_cache=False).logits


def recipe(base, data, *assignments):
    return plan(base, data, "offsite_tuning", *SMALLER, *assignments)


def replica_of(composed, whole=True):
    return Replica(load_base(composed.recipe.base), composed, whole)


def made_of(full, blocks=(0, 1, 4, 5)):
    """A plain model of these blocks of another."""
    config = type(full.config).from_dict({**full.config.to_dict(), "num_hidden_layers": len(blocks)})
    made = LlamaForCausalLM(config).eval()
    made.model.embed_tokens, made.lm_head, made.model.norm = full.model.embed_tokens, full.lm_head, full.model.norm
    for place, block in enumerate(blocks):
        made.model.layers[place].load_state_dict(full.model.layers[block].state_dict())
    return made


def trained(worker):
    """What a client answers when it is asked for round 1."""
    replica = worker.replica
    known = {"recipe_id": replica.plan.id, "base_digest": replica.base.digest, "head": worker.head}
    reply = worker.handle(Request("train", {**known, "round": 1, "progress": 0.0, "group": -1}))
    assert reply.error is None
    return reply.payloads[0]


@pytest.fixture(scope="module")
def finished(base, data, tmp_path_factory):
    """Two rounds with an aligned emulator: plan, folder, summary, events, every reply of a client."""
    composed = recipe(base, data, "emulator.align_steps=2", "emulator.align_lr=0.01", f"emulator.align_path={data}")
    folder, events, replies = tmp_path_factory.mktemp("run"), [], []
    handle = LocalExchange.exchange

    def watched(self, requests, timeout):
        for client, reply in handle(self, requests, timeout):
            replies.append(reply)
            yield client, reply

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalExchange, "exchange", watched)
        summary = federate(composed, folder, events.append)
    return composed, folder, summary, events, replies


def test_the_kept_blocks_are_the_published_ones():
    """Kills: a middle that begins at 0, an end that may be empty, indices that round up, a division by zero for one."""
    for layers in (3, 6, 12, 32):
        for left in range(layers):
            for right in range(left + 1, layers + 1):
                for drop in (0.0, 0.2, 0.5, 0.8):
                    low, high = max(left, 1), min(right, layers - 1)
                    count = round((high - low) * (1 - drop))
                    section = EmulatorSection(left=left, right=right, drop=drop)
                    if high <= low or count == 0:
                        with pytest.raises(RecipeError):
                            layout(section, layers)
                        continue
                    places = [int(i * ((high - low) - 1) / (count - 1)) if count > 1 else 0 for i in range(count)]
                    found = layout(section, layers)
                    assert found.kept == tuple(low + place for place in places)
                    assert found.held == low + count + layers - high == layers - sum(map(found.dropped, range(layers)))
    assert layout(EmulatorSection(left=2, right=30), 32).held == 2 + 22 + 2


def test_the_emulator_is_the_model_made_of_its_blocks(base, data):
    """Kills: a gap that changes what passes; blocks in another order; a whole that is not the base; an adapter that
    would be read back onto more than the ends."""
    composed = recipe(base, data, "parametrization.config.target_modules=[q_proj]")
    replica, full = replica_of(composed), load_base(composed.recipe.base).model
    made = made_of(full)
    assert torch.equal(logits(replica.model), logits(made))
    with replica.whole():
        assert torch.equal(logits(replica.model), logits(full))
    assert torch.equal(logits(replica.model), logits(made))
    (config,) = replica.model.peft_config.values()
    assert config.target_modules == {f"model.layers.{block}.self_attn.q_proj" for block in (0, 5)}


def test_without_drop_emulator_and_plug_in_are_one(base, data, tmp_path):
    """Kills: ends that are trained apart from those that are plugged in."""
    composed = recipe(base, data, "emulator.drop=0")
    worker = independent("ada", composed, deeper(base), tmp_path)
    replica = worker.replica
    before = logits(replica.model)
    assert (logits(load_base(composed.recipe.base).model) - before).abs().max() <= 1e-6
    replica.apply(1, trained(worker))
    after = logits(replica.model)
    assert (after - before).abs().max() > 1e-3
    with replica.whole():
        assert (logits(replica.model) - after).abs().max() <= 1e-6


def test_a_run_tells_both_scores_and_no_message_holds_a_middle_tensor(finished, base):
    """Kills: one score under two names; adapters on the middle that are trained or sent."""
    composed, folder, summary, events, replies = finished
    blocks = summary["emulator"]
    assert (blocks["kept"], blocks["held"], blocks["layers"]) == ((1, 4), 4, 6)
    measured = [event for event in events if event["event"] == "evaluation"]
    assert [event["emulator"] for event in measured] == [summary["eval_emulator"][at] for at in ("before", "after")]
    assert all(event["emulator"]["loss"] != event["overall"]["loss"] for event in measured)
    shapes = replica_of(composed).shapes
    assert {int(BLOCK.search(name)[1]) for name in shapes} == {0, 5}
    numbers = {name: shape.numel() for name, shape in ((n, torch.Size(s)) for n, s in shapes.items())}
    sent = {len(payload) for reply in replies for payload in reply.payloads}
    assert sent == {composed.uplink.predict_bytes(numbers, 0)}
    assert (
        summary["payload_up_bytes_per_client_round"]
        == payload_bytes(composed, numbers, 3)["payload_up_bytes_per_client_round"]
    )
    config = peft.PeftConfig.from_pretrained(str(folder / "adapter"))
    assert {name.split(".")[2] for name in config.target_modules} == {"0", "5"}


def test_the_ends_are_plugged_in_by_name(finished, tmp_path):
    """Kills: a plug-in that goes by position; an adapter that reads itself back onto the middle."""
    composed, folder, _, _, _ = finished
    tuned = open_tuned(str(folder))
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    config = peft.PeftConfig.from_pretrained(str(folder / "adapter"))
    config.save_pretrained(str(tmp_path))
    save_file(dict(reversed(stored.items())), tmp_path / "adapter_model.safetensors", {"format": "pt"})
    full = LlamaForCausalLM.from_pretrained(composed.recipe.base, dtype=torch.float32).eval()
    again = peft.PeftModel.from_pretrained(full, str(tmp_path)).eval()
    assert torch.equal(logits(again), logits(tuned.model))
    replica, state = replica_of(composed), tuned.replica.trainable.state()
    replica.trainable.restore(dict(reversed(state.items())))
    with replica.whole():
        assert torch.equal(logits(replica.model), logits(tuned.model))


def test_a_client_without_the_dropped_blocks_answers_as_one_with_all(base, data, tmp_path, finished):
    """Kills: a client that needs the full model; a middle that learns; dropped weights that stay in memory; simulated
    clients that train on an emulator that is not the aligned one."""
    composed = recipe(base, data)
    other = independent("ada", composed, Path(composed.recipe.base), tmp_path / "other")
    worker = independent("ada", composed, Path(composed.recipe.base), tmp_path, whole=False)
    replica, base = worker.replica, worker.replica.base
    facts = read_facts("x", base.path)
    spared = unread(composed, "x", base.path)
    assert base.parameters().keys() == thinned(composed, facts).shapes.keys() == facts.shapes.keys() - spared
    with pytest.raises(ModelError, match="left out"), replica.whole():
        pass
    answer = trained(worker)
    assert answer == trained(other)
    (sent,) = [c for c in Ledger.load(finished[1]).records[0].contributions if c.client == "ada"]
    assert len(sent.payload_sha256) == 64
    assert hashlib.sha256(answer).hexdigest() != sent.payload_sha256
    for block in replica.middle.kept.values():
        assert all(param.grad is None and not param.requires_grad for param in block.parameters())
    loaded = load_base(composed.recipe.base)
    assert all(torch.equal(param, loaded.parameters()[name]) for name, param in base.parameters().items())
    gone, stays = (weakref.ref(loaded.model.model.layers[block].mlp.up_proj.weight) for block in (2, 4))
    kept = Replica(loaded, composed, whole=False)
    assert (gone(), stays() is None, len(kept.middle.kept)) == (None, False, 2)


def aligned_plainly(full, student, examples, steps, weight):
    """A row after the other with torch's own AdamW, a step for all; the distances before every step."""
    rule = torch.optim.AdamW(student.model.layers[1:3].parameters(), lr=0.01, weight_decay=0.0)
    history = []
    for _ in range(steps):
        rule.zero_grad()
        history.append(0.0)
        counts = [(example.labels[1:] != -100).sum() for example in examples]
        for example, count in zip(examples, counts, strict=True):
            ids, labels = (torch.from_numpy(row).long()[None] for row in (example.input_ids, example.labels))
            teacher = full.model(input_ids=ids, output_hidden_states=True).hidden_states[5]
            seen = student(input_ids=ids, labels=labels, output_hidden_states=True)
            # what goes into the first block after the middle, in both models
            kd = ((teacher - seen.hidden_states[3]) / teacher.square().mean().sqrt()).square().mean()
            (count / sum(counts) * (weight * kd + (1 - weight) * seen.loss)).backward()
            history[-1] += float(count / sum(counts) * kd.detach())
        rule.step()
    return history


def test_alignment_is_that_of_a_plain_loop(base, data):
    """Kills: a distance to something else than the full middle; rows that count alike; a wrong weight or rate; steps
    that move the ends or the full model, or leave gradients behind."""
    settings = ("emulator.align_lr=0.01", "emulator.align_path=x", "emulator.align_kd=0.8", "micro_batch_tokens=64")
    composed = recipe(base, data, "emulator.align_steps=4", *settings)
    replica, full = replica_of(composed), load_base(composed.recipe.base).model
    examples = encode_rows(composed, replica.base, split_rows(composed, alone=True).clients["local"][:2], "", quiet)
    student = made_of(full)
    start, kept = logits(student), dict(replica.middle.kept)
    expected = aligned_plainly(full, student, examples, 4, 0.8)
    history = align(replica, examples, quiet)
    assert history == pytest.approx(expected, rel=1e-4)
    assert history[-1] < 0.9 * history[0]
    assert (logits(replica.model) - logits(student)).norm() < 1e-3 * (logits(student) - start).norm()
    params = [*replica.model.parameters(), *nn.ModuleList(replica.middle.kept.values()).parameters()]
    assert all(param.grad is None and not param.requires_grad for param in params)
    assert all(replica.middle.kept[at] is not block for at, block in kept.items())
    with replica.whole():
        assert torch.equal(logits(replica.model), logits(full))
    same = replica_of(recipe(base, data, "emulator.drop=0", "emulator.align_steps=1", "emulator.align_path=x"))
    assert align(same, examples, quiet) == [pytest.approx(0.0, abs=1e-9)]


def test_a_run_aligns_once_and_goes_on_with_what_it_has_aligned(base, data, finished):
    """Kills: another emulator after a restart; figures of one that was not aligned."""
    composed, folder, summary, events, _ = finished
    assert sum(event["event"] == "aligned" for event in events) == 1
    replica = replica_of(composed)
    thin = logits(replica.model)
    load_aligned(replica, folder, pytest.fail, quiet)
    assert not torch.equal(logits(replica.model), thin)
    rows = encode_rows(composed, replica.base, split_rows(composed, alone=False).held_out, "", quiet)
    measured = evaluator(composed, quiet)(replica, rows)
    assert measured.emulator.to_json() == summary["eval_emulator"]["before"]
    replica.plan = recipe(base, data, "emulator.align_steps=1", f"emulator.align_path={data}")
    with pytest.raises(RunError, match="another recipe or base"):
        load_aligned(replica, folder, pytest.fail, quiet)


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (("emulator.left=5",), "emulator.left: got 5, expected less than emulator.right"),
        (("emulator.drop=1.0",), "emulator.drop: got 1.0, expected less than 1"),
        (("emulator.drop=-0.1",), "emulator.drop: got -0.1, expected greater than or equal to 0"),
        (("parametrization=full",), "trains the weights themselves"),
        (("emulator.align_steps=3",), "align_path"),
    ],
)
def test_what_makes_no_emulator_is_refused_with_the_recipe(base, data, assignments, words):
    """Kills: a middle without blocks or with all weights trained, found out in round 1."""
    with pytest.raises(RecipeError, match=words):
        recipe(base, data, *assignments)


def test_what_the_base_or_a_deployment_does_not_allow_is_refused(base, data):
    """Kills: a base with too few blocks that fails with a traceback; an aligned emulator that clients do not have."""
    for section, words in (
        ({"left": 1, "right": 7}, "got 7, but the base has 6 blocks"),
        ({"left": 5, "right": 6}, "leave no middle"),
        ({"left": 1, "right": 2, "drop": 0.6}, "leaves none of 1 blocks"),
    ):
        with pytest.raises(RecipeError, match=words):
            layout(EmulatorSection(**section), 6)
    aligned = recipe(base, data, "emulator.align_steps=2", "emulator.align_path=rows.jsonl")
    with pytest.raises(RecipeError, match="align_steps=0"):
        require_deployable(aligned, server=False)
    with pytest.raises(RecipeError, match=r"data\.eval_path: missing"):
        require_deployable(recipe(base, data), server=True)
    require_deployable(recipe(base, data), server=False)
    alone = content(base, data, "local_lora") | {"emulator": {"left": 1, "right": 5}}
    with pytest.raises(RecipeError, match="emulator: has no effect when one machine tunes alone"):
        build(alone, "tune")


def test_the_plan_counts_the_ends_alone(base, data):
    """Kills: a prediction for adapters on all blocks."""
    composed = recipe(base, data)
    wire = {str(count): _Slice(composed, deeper(base), count).wire() for count in (SMALL, LARGE)}
    found = wire_numbers(composed, read_facts("x", deeper(base)), {"wire": wire})
    assert found == {name: torch.Size(shape).numel() for name, shape in replica_of(composed).shapes.items()}
