"""Evaluation and generation: figures equal a slow one-by-one computation, whatever the batching."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from rouge_score.rouge_scorer import RougeScorer

from engine.tiny_tokenizer import tiny_tokenizer
from kilotune.core.rng import stream
from kilotune.engine.model.evaluation import EvaluationReport, Figures, evaluate
from kilotune.engine.model.generation import default_stop_ids, generate, stream_tokens
from kilotune.engine.rows.tokenize import Example
from tiny import tiny_llama

NEW = 9


def examples(count=7):
    """Rows of differing length of three clients; some references are what the model will say."""
    model, tokenizer, rows = tiny_llama(), tiny_tokenizer(), []
    for row in range(count):
        rng = stream(5, "example", row)
        prompt = rng.integers(3, 260, int(rng.integers(2, 9))).astype(np.int32)
        answer = rng.integers(3, 260, int(rng.integers(1, 6))).astype(np.int32)
        reference = tokenizer.decode(one_by_one(model, prompt)) if row % 2 else f"the room {row}"
        labels = np.concatenate([np.full(len(prompt), -100, np.int32), answer])
        rows.append(Example(np.concatenate([prompt, answer]), labels, len(prompt), reference, "abc"[row % 3], row))
    return rows


def one_by_one(model, prompt, stops=(2,)):
    """The oracle of generation: the whole text again for every token, no cache, no padding."""
    tokens, new = torch.tensor([[int(t) for t in prompt]]), []
    for _ in range(NEW):
        token = int(model(input_ids=tokens, use_cache=False).logits[0, -1].argmax())
        if token in stops:
            break
        new.append(token)
        tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)
    return new


def mean_loss(model, rows):
    """The oracle of the loss: one row at a time, all logits."""
    total, count = 0.0, 0
    for row in rows:
        tokens = torch.tensor(row.input_ids[None].astype(np.int64))
        log_p = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits[0].double(), dim=-1)
        for place in range(1, len(row.input_ids)):
            if row.labels[place] != -100:
                total -= float(log_p[place - 1, int(row.labels[place])])
                count += 1
    return total / count


@pytest.mark.parametrize("batch_tokens", [1, 20, 4096])
def test_loss_equals_one_row_at_a_time_overall_and_per_client(batch_tokens):
    """Kills: a mean of batch means; padding that changes the loss; a row counted for another client."""
    model, rows = tiny_llama(), examples()
    report = evaluate(model, tiny_tokenizer(), rows, max_new_tokens=0, batch_tokens=batch_tokens)
    assert report.overall.loss == pytest.approx(mean_loss(model, rows), rel=1e-5)
    assert report.overall.perplexity == pytest.approx(math.exp(mean_loss(model, rows)), rel=1e-4)
    assert list(report.clients) == ["a", "b", "c"]
    for name, figures in report.clients.items():
        mine = [row for row in rows if row.client == name]
        assert figures.num_examples == len(mine)
        assert figures.loss == pytest.approx(mean_loss(model, mine), rel=1e-5)


def test_answers_are_measured_against_their_own_reference():
    """Kills: answers in batch order compared with references in row order; percent in place of a fraction."""
    model, tokenizer, rows = tiny_llama(), tiny_tokenizer(), examples()
    figures = evaluate(model, tokenizer, rows, max_new_tokens=NEW).overall
    answers = [tokenizer.decode(one_by_one(model, row.prompt_ids), skip_special_tokens=True) for row in rows]
    exact = [answer.strip() == row.reference.strip() for answer, row in zip(answers, rows, strict=True)]
    scorer = RougeScorer(["rougeL"])
    rouge = [scorer.score(row.reference, a)["rougeL"].fmeasure for a, row in zip(answers, rows, strict=True)]
    assert 0 < sum(exact) < len(rows)
    assert figures.exact_match == sum(exact) / len(rows)
    assert figures.rouge_l == pytest.approx(sum(rouge) / len(rows))


def test_only_the_first_rows_are_answered_under_a_limit():
    """Kills: a limit on the loss too; exact match divided by rows that were never asked."""
    model, tokenizer, rows = tiny_llama(), tiny_tokenizer(), examples()
    whole = evaluate(model, tokenizer, rows, max_new_tokens=NEW)
    part = evaluate(model, tokenizer, rows, max_new_tokens=NEW, generate_limit=2)
    first = evaluate(model, tokenizer, rows[:2], max_new_tokens=NEW)
    assert part.overall.loss == whole.overall.loss and part.overall.num_examples == len(rows)
    assert part.overall.exact_match == first.overall.exact_match and part.overall.generated == 2


def test_what_was_not_measured_is_null():
    """Kills: NaN in JSON; 0 % exact match for rows without a prompt."""
    nothing = {"num_examples": 0, "loss": None, "perplexity": None, "exact_match": None, "rouge_l": None}
    assert evaluate(tiny_llama(), tiny_tokenizer(), []).to_json() == {"overall": nothing, "clients": {}}
    ids = np.arange(3, 9, dtype=np.int32)
    report = evaluate(tiny_llama(), tiny_tokenizer(), [Example(ids, ids, 0, "text", None, 0)])
    assert report.overall.exact_match is None and report.overall.tokens == 5 and report.clients == {}


def test_reports_of_clients_add_up_to_the_report_on_all_rows():
    """Kills: means of means; sums that depend on who answers first."""
    model, tokenizer, rows = tiny_llama(), tiny_tokenizer(), examples()
    whole = evaluate(model, tokenizer, rows, max_new_tokens=NEW)
    sums = {}
    for name in ("c", "a", "b"):
        alone = evaluate(model, tokenizer, [row for row in rows if row.client == name], max_new_tokens=NEW)
        sums[name] = {**alone.to_sums(), "round": 3}
    joined = EvaluationReport.from_sums(sums)
    assert joined == EvaluationReport.from_sums(dict(sorted(sums.items())))
    assert joined.overall.loss == pytest.approx(whole.overall.loss, rel=1e-6)
    assert joined.overall.exact_match == whole.overall.exact_match
    assert joined.clients_to_json().keys() == whole.clients_to_json().keys()


def test_of_fewer_clients_than_asked_for_nothing_is_told():
    """Kills: the figures of one client as those of a federation; a limit that is one off."""
    sums = {f"c{n}": {f"eval_{k}": v for k, v in vars(Figures(1, 2.0 + n, 4)).items()} for n in range(3)}
    assert EvaluationReport.from_sums(sums, 4) == EvaluationReport.from_sums({})
    assert EvaluationReport.from_sums(sums, 3).overall.tokens == 12


def test_the_worst_tenth_of_the_clients_is_told_beside_their_mean():
    """Kills: a mean weighted by rows; the best tenth; a tenth rounded down to nobody."""
    losses = [float(n) for n in range(1, 13)]
    sums = {
        f"c{n:02d}": {f"eval_{k}": v for k, v in vars(Figures(n + 1, loss * (n + 1), n + 1)).items()}
        for n, loss in enumerate(losses)
    }
    spread = EvaluationReport.from_sums(sums).to_json()["spread"]
    assert spread == {"clients": 12, "mean_loss": 6.5, "worst_decile_loss": 11.5}


def test_progress_ends_at_its_total():
    """Kills: a bar that never fills."""
    seen = []
    evaluate(tiny_llama(), tiny_tokenizer(), examples(), max_new_tokens=2, progress=lambda *at: seen.append(at))
    assert seen[-1] == (14, 14) and [at[0] for at in seen] == sorted(at[0] for at in seen)


def test_perplexity_of_a_hopeless_loss_is_finite():
    """Kills: an overflow error after a diverged run."""
    assert math.isfinite(Figures(num_examples=1, loss_sum=1e9, tokens=1).perplexity)


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_generation_equals_one_token_at_a_time(batch_tokens):
    """Kills: left padding that is seen; wrong positions; rows mixed up when ended ones leave the cache."""
    model, tokenizer = tiny_llama(3), tiny_tokenizer()
    prompts = [stream(1, "prompt", i).integers(3, 260, 1 + i * 2).tolist() for i in range(6)]
    expected = [one_by_one(model, prompt, ()) for prompt in prompts]
    stops = sorted({expected[1][2], expected[3][4], expected[4][0]})  # rows end at different steps
    cut = [tokens[: next((i for i, t in enumerate(tokens) if t in stops), NEW)] for tokens in expected]
    assert len({len(tokens) for tokens in cut}) > 2
    got = generate(model, tokenizer, prompts, NEW, stop_ids=stops, batch_tokens=batch_tokens)
    assert got == [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in cut]


def test_generation_with_virtual_tokens_equals_transformers():
    """Kills: a cache that does not count the virtual tokens of prompt tuning."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = get_peft_model(tiny_llama(), config).eval()
    prompt = [5, 6, 7, 8]
    expected, tokens = [], torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(NEW):
            token = int(model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, -1].argmax())
            expected.append(token)
            tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)
    tokenizer = tiny_tokenizer()
    assert generate(model, tokenizer, [prompt], NEW, stop_ids=[]) == [tokenizer.decode(expected)]


def test_streamed_pieces_join_to_the_generated_answer():
    """Kills: half of a character shown as a question mark; a piece shown twice; the limit missed by one."""
    model, tokenizer = tiny_llama(3), tiny_tokenizer()
    prompt = tokenizer("the room is 21 °C é")["input_ids"]
    for limit in (0, 1, 30):
        pieces = list(stream_tokens(model, tokenizer, prompt, max_new_tokens=limit, stop_ids=[2]))
        assert "".join(pieces) == generate(model, tokenizer, [prompt], limit, stop_ids=[2])[0]


def test_half_a_character_is_never_shown():
    """Kills: question marks that a terminal cannot take back; a last character swallowed."""
    tokenizer = tiny_tokenizer()
    text = "21 °C é"
    script = iter([*tokenizer(text)["input_ids"], 2])

    def says(**_):
        logits = torch.zeros(1, 1, 300)
        logits[0, 0, next(script)] = 1
        return SimpleNamespace(past_key_values=None, logits=logits)

    pieces = list(stream_tokens(says, tokenizer, [5], stop_ids=[2]))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_sampling_follows_its_generator_and_the_softmax():
    """Kills: the global generator; a temperature that multiplies."""
    model, tokenizer = tiny_llama(3), tiny_tokenizer()

    def sample(seed, temperature):
        rng = torch.Generator().manual_seed(seed)
        return "".join(
            stream_tokens(model, tokenizer, [5, 6], max_new_tokens=8, temperature=temperature, generator=rng)
        )

    before = torch.get_rng_state()
    assert sample(1, 1.0) == sample(1, 1.0)
    assert len({sample(seed, 1.0) for seed in range(4)}) > 1
    assert torch.equal(torch.get_rng_state(), before)
    greedy = "".join(stream_tokens(model, tokenizer, [5, 6], max_new_tokens=8))
    assert sample(1, 1e-4) == greedy


def test_stop_tokens_are_eos_and_the_end_of_turn():
    """Kills: answers that run past the end of the turn; an unknown token that ends every answer."""
    tokenizer = tiny_tokenizer()
    assert default_stop_ids(tiny_llama(), tokenizer) == [2]
    tokenizer.eos_token = "<|endoftext|>"
    model = tiny_llama()
    model.generation_config.eos_token_id = [0, 7]
    assert default_stop_ids(model, tokenizer) == [0, 2, 7]
