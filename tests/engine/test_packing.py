"""Packed rows give every labelled token the loss and gradient it has alone, at the cost of the distinct tokens."""

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

from kilotune.core.rng import stream
from kilotune.engine.model.loss import answer_loss, label_losses
from kilotune.engine.rows.batches import can_pack, collate, lay_out
from kilotune.engine.rows.tokenize import IGNORE, Example
from tiny import tiny_llama

FIXED = hypothesis.settings(derandomize=True, deadline=None, max_examples=40)


def example(tokens, prompt, row=0):
    ids = np.array(tokens, dtype=np.int32)
    labels = np.where(np.arange(len(ids)) >= prompt, ids, IGNORE).astype(np.int32)
    return Example(ids, labels, prompt, "", None, row)


def rows_with_common_starts(seed, count, groups=2, start=9):
    """Rows of a few groups; those of a group begin with the same `start` tokens, some are equal up to their answer."""
    rng = stream(seed, "packing")
    starts = rng.integers(3, 300, (groups, start))
    rows = []
    for _ in range(count):
        head = starts[int(rng.integers(groups))][: int(rng.integers(start - 3, start + 1))].tolist()
        middle = rng.integers(3, 300, int(rng.integers(0, 6))).tolist()
        answer = rng.integers(3, 300, int(rng.integers(1, 5))).tolist()
        rows.append(example([*head, *middle, *answer], len(head) + len(middle)))
    return rows


def losses_of(model, examples, batches):
    """Per example, the losses of its labelled tokens in order."""
    found = {i: [] for i in range(len(examples))}
    for batch in batches:
        result = label_losses(model, batch)
        for row, loss in zip(result.rows.tolist(), result.losses.tolist(), strict=True):
            found[row].append(loss)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_every_labelled_token_has_the_loss_it_has_alone(seed):
    """Kills: a token that sees another row, a wrong position, a label across a border, a row lost or doubled."""
    model = tiny_llama()
    examples = rows_with_common_starts(seed, 12)
    packed = losses_of(model, examples, lay_out(examples, 64, 0, packed=True))
    for row, alone in enumerate(examples):
        expected = label_losses(model, collate([alone], 0)).losses.tolist()
        assert packed[row] == pytest.approx(expected, rel=2e-5, abs=2e-6)


def test_the_gradient_is_that_of_padded_rows():
    """Kills: a shared start whose gradient counts once instead of once per row."""
    model = tiny_llama()
    examples = rows_with_common_starts(5, 10, groups=1)
    gradients = []
    for batches in (lay_out(examples, 1000, 0, packed=True), [collate(examples, 0)]):
        model.requires_grad_(True)
        sum(answer_loss(model, batch, "sum") for batch in batches).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        model.zero_grad()
    for name, expected in gradients[1].items():
        assert torch.allclose(gradients[0][name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())), name


def test_shared_starts_are_computed_once():
    """Kills: a pack that repeats what its rows have in common. Seven of ten tokens are shared by four rows here."""
    examples = [example([5, 6, 7, 8, 9, 10, 11, 20 + i, 40 + i, 60 + i], 8) for i in range(4)]
    (batch,) = lay_out(examples, 1000, 0, packed=True)
    assert batch.input_ids.tolist() == [
        [5, 6, 7, 8, 9, 10, 11, *(v for i in range(4) for v in (20 + i, 40 + i, 60 + i))]
    ]
    assert batch.positions.tolist() == [[*range(7), *[7, 8, 9] * 4]]
    assert batch.visible[0, 0, -1].nonzero().flatten().tolist() == [*range(7), 16, 17, 18]
    assert batch.num_labels == 8


def test_equal_prompts_with_different_answers_share_all_but_the_token_that_predicts():
    """Kills: a position that would have to predict two different tokens."""
    examples = [example([5, 6, 7, 8, 30], 4), example([5, 6, 7, 8, 40], 4), example([5, 6, 7, 8, 30], 4)]
    (batch,) = lay_out(examples, 1000, 0, packed=True)
    assert batch.num_labels == 3
    assert sorted(batch.input_ids[0].tolist()) == [5, 6, 7, 8, 8, 8, 30, 30, 40]


@hypothesis.example([60, 1, 1], 100)
@given(st.lists(st.integers(2, 60), min_size=1, max_size=30), st.integers(1, 200))
@FIXED
def test_batches_hold_every_label_once_within_the_budget(lengths, budget):
    """Kills: an example lost or repeated; a budget that forgets the padding; shared starts of plain texts with loss."""
    examples = [example(range(1, length + 1), min(i % 3, length - 1)) for i, length in enumerate(lengths)]
    for packed in (False, True):
        batches = lay_out(examples, budget, 0, packed)
        counted = [0] * len(examples)
        for batch in batches:
            for row in batch.rows[:, 1:][batch.labels[:, 1:] != IGNORE].tolist():
                counted[row] += 1
        assert counted == [e.num_labels for e in examples]
        for batch in batches:
            assert len(batch.input_ids) == 1 or batch.input_ids.numel() <= budget


def test_padding_is_right_masked_and_without_loss():
    """Kills: left padding; padding that is attended to or learnt; a dtype the model refuses."""
    batch = collate([example([1, 2, 3], 1), example([1, 2, 3, 4, 5], 4)], pad_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 3, 9, 9], [1, 2, 3, 4, 5]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch.labels.tolist() == [[-100, 2, 3, -100, -100], [-100, -100, -100, -100, 5]]
    assert batch.rows.tolist() == [[0, 0, 0, -1, -1], [1] * 5]
    assert batch.num_labels == 3
    assert {t.dtype for t in (batch.input_ids, batch.labels, batch.attention_mask)} == {torch.int64}


def test_models_that_cannot_are_found_out():
    """Kills: packing where masks are rebuilt inside the model (Bloom) or a window would be ignored (Mistral)."""
    with torch.random.fork_rng(devices=[]):
        small = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 4}
        bloom = BloomForCausalLM(
            BloomConfig(n_layer=2, n_head=4, **{k: small[k] for k in ("vocab_size", "hidden_size")})
        )
        mistral = {"num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 64, **small}
        windowed = MistralForCausalLM(MistralConfig(sliding_window=4, **mistral))
        whole = MistralForCausalLM(MistralConfig(sliding_window=None, **mistral))
    assert can_pack(tiny_llama())
    assert not can_pack(bloom.eval())
    assert not can_pack(windowed.eval())
    assert can_pack(whole.eval())
