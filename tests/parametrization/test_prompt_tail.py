"""Prompts in front of every row: the vectors of peft's prompt tuning, wherever a model is called."""

import pytest
import torch

from kilotune.core.errors import ModelError
from kilotune.engine.model.base import Base
from kilotune.engine.model.export import export_model
from kilotune.engine.model.generation import generate
from kilotune.engine.model.loss import answer_loss
from kilotune.engine.rows.batches import can_pack
from kilotune.parametrization.peft import Peft
from kilotune.parametrization.prompt_tail import PromptTail
from tiny import tiny_batch, tiny_llama

STOP = 2


class Words:
    """A tokenizer whose text is its numbers."""

    eos_token_id = STOP

    def decode(self, tokens, skip_special_tokens):
        return " ".join(map(str, tokens))


def pair():
    """Our model and peft's with the same prompts; the tail's pairs start at zero."""
    ours = PromptTail(prompts=4, tail=1, rank=2, spread=1.0).attach(tiny_llama(), basis=None, seed=3)
    config = {"num_virtual_tokens": 4, "prompt_tuning_init": "RANDOM"}
    theirs = Peft(method="prompt_tuning", config=config).attach(tiny_llama(), basis=None, seed=3)
    (vectors,) = theirs.wire.values()
    vectors.copy_(ours.wire["prompts"])
    return ours, theirs


def test_losses_and_answers_are_those_of_pefts_prompt_tuning():
    """Kills: prompts that some token does not see; positions that start anew after them; prompts twice or never where
    keys are cached or rows are padded on the left."""
    ours, theirs = pair()
    batch = tiny_batch(2)
    torch.testing.assert_close(answer_loss(ours.model, batch), answer_loss(theirs.model, batch), atol=2e-6, rtol=1e-5)
    assert abs(float(answer_loss(ours.model, batch) - answer_loss(tiny_llama(), batch))) > 1e-3
    prompts = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    found, expected = (generate(t.model, Words(), prompts, 6, stop_ids=[STOP]) for t in (ours, theirs))
    assert found == expected
    assert can_pack(ours.model)


def test_only_prompts_and_the_last_blocks_are_trained_and_the_prompts_start_small():
    trainable = PromptTail(prompts=4, tail=1, rank=2, spread=0.1).attach(tiny_llama(), basis=None, seed=3)
    names = set(trainable.wire) - {"prompts"}
    assert len(names) == 2 * 7
    assert all(".layers.1." in name for name in names)
    assert 0.05 < float(trainable.wire["prompts"].abs().max()) < 0.1


def test_no_folder_of_weights_is_made_of_a_model_with_prompts(tmp_path):
    """Kills: a folder that loads without its prompts; a comparison that fails with no way out."""
    ours, _ = pair()
    with pytest.raises(ModelError, match=r"in front of every row.* Use the run itself"):
        export_model(ours.model, Base("tiny", tmp_path, ours.model, None, ""), tmp_path / "out")
