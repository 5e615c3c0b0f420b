"""The pool of scale-and-shift sets: a row is computed with the sets its own prompt chooses, whatever is beside it."""

from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch

from engine.tiny_tokenizer import tiny_tokenizer
from kilotune.core.choosing import chooser
from kilotune.core.errors import IncompatibleError, ModelError
from kilotune.core.rng import stream
from kilotune.engine.composing.compose import compose
from kilotune.engine.model.base import Base
from kilotune.engine.model.compute import Compute
from kilotune.engine.model.evaluation import evaluate
from kilotune.engine.model.export import export_model
from kilotune.engine.model.generation import _greedy
from kilotune.engine.model.loss import label_losses
from kilotune.engine.rows.batches import can_pack, collate, lay_out
from kilotune.engine.rows.tokenize import Example
from kilotune.engine.training.step import BatchObjective
from kilotune.estimator.backprop import Backprop
from kilotune.parametrization.ssf_pool import SsfPool
from tiny import tiny_batch, tiny_llama

SIZE, COUNT, PULL = 6, 2, 0.1


def pooled(count: int = COUNT, seed: int = 1):
    """A model whose sets all differ."""
    trainable = SsfPool(size=SIZE, count=count, pull=PULL).attach(tiny_llama(), basis=None, seed=seed)
    for name, value in trainable.wire.items():
        if name != "keys":
            value += torch.from_numpy(stream(5, name).normal(0, 0.2, tuple(value.shape))).float()
    return trainable


def example(row: int) -> Example:
    """A prompt and an answer, of several lengths; all prompts begin alike."""
    rng = stream(9, row)
    prompt = [1, 4, 5, *rng.integers(3, 300, 3 + row).tolist()]
    ids = np.array(prompt + rng.integers(3, 300, 6 - row % 3).tolist(), dtype=np.int32)
    return Example(ids, np.where(np.arange(len(ids)) < len(prompt), -100, ids), len(prompt), "", None, row)


EXAMPLES = [example(row) for row in range(5)]
PROMPTS = [one.prompt_ids.tolist() for one in EXAMPLES]


@cache
def base_model():
    """A base that no pool has touched."""
    return tiny_llama()


@torch.no_grad()
def query_by_hand(prompt: list[int]) -> torch.Tensor:
    return base_model().model(input_ids=torch.tensor([prompt])).last_hidden_state[0].mean(0)


def choice_by_hand(keys: torch.Tensor, prompt: list[int]) -> torch.Tensor:
    """The sets of one row."""
    query = query_by_hand(prompt)
    return (keys @ query / keys.norm(dim=1) / query.norm()).argsort(descending=True)[:COUNT].sort().values


@contextmanager
def moved_by(trainable, sets: torch.Tensor):
    """Inside, the base with these sets behind its modules, for all rows alike."""

    def mover(name):
        gamma, beta = (trainable.wire[f"{name}.{part}"] for part in ("gamma", "beta"))
        return lambda module, args, output: (
            sum(gamma[s] for s in sets) / COUNT * output + sum(beta[s] for s in sets) / COUNT
        )

    modules = dict(base_model().named_modules())
    names = {name.rpartition(".")[0] for name in trainable.wire} - {""}
    assert len(names) == 2 * (7 + 2) + 1
    handles = [modules[name].register_forward_hook(mover(name)) for name in names]
    try:
        yield base_model()
    finally:
        for handle in handles:
            handle.remove()


def losses_by_hand(trainable, sets: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each example's loss per answer token, by transformers' own model and one at a time."""
    found = []
    for one, chosen in zip(EXAMPLES, sets, strict=True):
        ids = torch.from_numpy(one.input_ids).long()[None]
        with moved_by(trainable, chosen) as model:
            logits = model(input_ids=ids).logits[0, one.prompt_length - 1 : -1]
        found.append(torch.nn.functional.cross_entropy(logits, ids[0, one.prompt_length :], reduction="none"))
    return found


def test_a_new_pool_leaves_every_logit_as_it_is():
    """Kills: sets that do not start at scale 1 and shift 0; a mean that is not exact."""
    trainable = SsfPool(size=SIZE, count=3).attach(tiny_llama(), basis=None, seed=1)
    tokens = tiny_batch().input_ids
    assert torch.equal(trainable.model(input_ids=tokens).logits, base_model()(input_ids=tokens).logits)


def test_with_all_sets_chosen_keys_do_not_matter():
    """Kills: sets weighed by their cosine; an order of the sum that follows the keys."""
    one, other = pooled(SIZE), pooled(SIZE, seed=2)
    tokens = tiny_batch().input_ids
    assert not torch.equal(one.wire["keys"], other.wire["keys"])
    assert torch.equal(one.model(input_ids=tokens).logits, other.model(input_ids=tokens).logits)


def test_prompts_choose_as_by_hand_and_gradients_touch_the_chosen_sets_alone():
    """Kills: a query with answers or padding in it, or from the tuned model; one choice for a whole batch; a pull that
    reaches other keys, or none."""
    trainable = pooled()
    sets = [choice_by_hand(trainable.wire["keys"], prompt) for prompt in PROMPTS]
    assert len({tuple(chosen.tolist()) for chosen in sets}) > 2
    gradients = {}
    objective = BatchObjective(trainable.model, [collate(EXAMPLES, 0)])
    Backprop().estimate(objective, trainable, stream(0), {}, lambda n, g, _=0: gradients.update({n: g.clone()}))
    pool = chooser(trainable.model)
    assert torch.equal(pool.chosen, torch.stack(sets))
    used = torch.zeros(SIZE, dtype=torch.bool)
    used[pool.chosen.unique()] = True
    assert not used.all()
    assert gradients.keys() == trainable.wire.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient.ne(0).any(1), used), name


@pytest.mark.parametrize("compute", [Compute(), Compute(checkpointing=1.0)], ids=["kept", "checkpointed"])
def test_a_batch_of_mixed_choices_is_one_row_after_the_other(compute):
    """Kills: sets of one row used for another, in fused layers, over padding, in a second pass over the layers or in
    packed rows; a pull that is counted for each token. Bound: float32 sums in another order."""
    trainable = pooled()
    sets = [choice_by_hand(trainable.wire["keys"], prompt) for prompt in PROMPTS]
    alone = losses_by_hand(trainable, sets)
    mixed = label_losses(trainable.model, collate(EXAMPLES, 0))
    assert (mixed.losses - torch.cat(alone)).abs().max() < 1e-5
    assert not can_pack(trainable.model)
    batches = lay_out(EXAMPLES, 24, 0, can_pack(trainable.model))
    assert len(batches) > 1
    assert max(map(len, (batch.input_ids for batch in batches))) > 1
    gradients = {}
    objective = BatchObjective(trainable.model, batches, compute)
    loss = Backprop().estimate(objective, trainable, stream(0), {}, lambda n, g, _=0: gradients.update({n: g.clone()}))
    for value in trainable.wire.values():
        value.requires_grad_(True)
    keys, queries = trainable.wire["keys"], map(query_by_hand, PROMPTS)
    cosines = [torch.cosine_similarity(keys[s], q[None]).sum() for s, q in zip(sets, queries, strict=True)]
    expected = torch.cat(losses_by_hand(trainable, sets)).mean() + PULL * (1 - torch.stack(cosines)).mean()
    assert loss.loss == pytest.approx(expected.item(), abs=1e-5)
    expected.backward()
    for name, value in trainable.wire.items():
        torch.testing.assert_close(gradients[name], value.grad, rtol=1e-4, atol=2e-6)


def test_an_answer_is_generated_with_the_sets_of_its_prompt_to_its_end():
    """Kills: a choice that changes with the answer; rows that take over the sets of one that has ended."""
    trainable = pooled()
    sets = [choice_by_hand(trainable.wire["keys"], prompt) for prompt in PROMPTS]
    expected = []
    for prompt, chosen in zip(PROMPTS, sets, strict=True):
        tokens = list(prompt)
        with moved_by(trainable, chosen) as model:
            for _ in range(8):
                tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        expected.append(tokens[len(prompt) :])
    stops = [expected[0][1], expected[3][2]]
    cut = [row[: next((i for i, token in enumerate(row) if token in stops), 8)] for row in expected]
    assert min(map(len, cut)) <= 2 < max(map(len, cut))
    assert _greedy(trainable.model, PROMPTS, 8, stops) == cut
    assert [_greedy(trainable.model, [prompt], 8, stops)[0] for prompt in PROMPTS] == cut


def test_evaluation_measures_every_row_with_its_own_sets():
    """Kills: rows laid into one another where they are evaluated."""
    trainable = pooled()
    alone = losses_by_hand(trainable, [choice_by_hand(trainable.wire["keys"], prompt) for prompt in PROMPTS])
    report = evaluate(trainable.model, tiny_tokenizer(), EXAMPLES, max_new_tokens=0)
    assert report.overall.loss == pytest.approx(float(torch.cat(alone).mean()), abs=1e-5)


def test_what_no_plain_model_does_is_not_exported(tmp_path):
    """Kills: a folder that holds the base alone under the name of the tuned model."""
    trainable = pooled()
    with pytest.raises(ModelError, match="chooses for every row"):
        export_model(trainable.model, Base("tiny", tmp_path, trainable.model, None, ""), tmp_path / "out")
    assert not (tmp_path / "out").exists()


PRIVATE = ["privacy={name: local, clip: 0.5, epsilon: 8.0, delta: 1.0e-5}"]
ZEROTH = ["estimator={name: zeroth_order}", "optimizer={name: sgd, lr: 0.01}"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([*PRIVATE, *ZEROTH], "learns its choice from a term that is no example's loss"),
        (["emulator={left: 1, right: 29}"], "chooses by the last hidden states of all of it"),
    ],
)
def test_parts_that_look_at_rows_in_another_way_are_refused(changes, message):
    with pytest.raises(IncompatibleError, match=message):
        compose("fedins", "federate", changes)
