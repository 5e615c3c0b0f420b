"""Evaluation: loss, perplexity, exact match and ROUGE-L, over all examples and per client.

Source of ROUGE-L: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", ACL Workshop 2004; computed by the
    rouge-score package (F1 of the longest common subsequence of words; words are runs of a-z and 0-9).
Loss is the mean over the tokens of the answers. Answers are generated greedily; exact match compares them with the
reference, both without surrounding blanks. Sums are kept, so that reports of several clients add up to one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kilotune.engine.model.generation import generate
from kilotune.engine.model.loss import label_losses
from kilotune.engine.rows.batches import can_pack, lay_out
from kilotune.engine.rows.tokenize import Example

__all__ = ["EvaluationReport", "Figures", "evaluate"]

Progress = Callable[[int, int], None]

NOBODY = ""  # the client of rows without one


@dataclass
class Figures:
    """Sums over examples; the figures are their quotients, None where nothing was measured."""

    num_examples: int = 0
    loss_sum: float = 0.0
    tokens: int = 0
    generated: int = 0
    exact: int = 0
    rouge_sum: float = 0.0

    @property
    def loss(self) -> float:
        """Mean cross-entropy per answer token in nats; NaN without any."""
        return self.loss_sum / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0)) if self.tokens else math.nan

    @property
    def exact_match(self) -> float | None:
        return self.exact / self.generated if self.generated else None

    @property
    def rouge_l(self) -> float | None:
        return self.rouge_sum / self.generated if self.generated else None

    def add(self, other: "Figures") -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def to_json(self) -> dict[str, Any]:
        """The figures that commands print; null where nothing was measured or the loss is not finite."""
        return {
            "num_examples": self.num_examples,
            "loss": _finite(self.loss),
            "perplexity": _finite(self.perplexity),
            "exact_match": self.exact_match,
            "rouge_l": self.rouge_l,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass
class EvaluationReport:
    """Figures over everything and of each client, by name; `emulator`: what the clients' part of the model comes to
    on the same rows, where they hold no more than that."""

    overall: Figures
    clients: dict[str, Figures]
    emulator: Figures | None = None

    def clients_to_json(self) -> dict[str, dict[str, Any]]:
        return {name: figures.to_json() for name, figures in sorted(self.clients.items())}

    def to_json(self) -> dict[str, Any]:
        spread = {"spread": spread} if len(self.clients) > 1 and (spread := self.spread()) else {}
        emulator = {"emulator": self.emulator.to_json()} if self.emulator is not None else {}
        return {"overall": self.overall.to_json(), "clients": self.clients_to_json(), **emulator, **spread}

    def spread(self) -> dict[str, Any]:
        """How the clients fare, each counted once: the mean of their losses, and that of the worst tenth of them."""
        losses = sorted((f.loss for f in self.clients.values() if f.tokens), reverse=True)
        worst = losses[: -(-len(losses) // 10)]
        if not losses:
            return {}
        mean, tail = math.fsum(losses) / len(losses), math.fsum(worst) / len(worst)
        return {"clients": len(losses), "mean_loss": _finite(mean), "worst_decile_loss": _finite(tail)}

    def to_sums(self) -> dict[str, int | float]:
        """The overall sums as facts for a message."""
        return {f"eval_{name}": getattr(self.overall, name) for name in Figures.__dataclass_fields__}

    @classmethod
    def from_sums(cls, sums: Mapping[str, Mapping[str, Any]], min_clients: int = 1) -> "EvaluationReport":
        """From what `to_sums` returned at each client; other keys are ignored. The order of clients is irrelevant.
        Of fewer than `min_clients` nothing is reported: their figures would be about somebody."""
        fields = Figures.__dataclass_fields__
        if len(sums) < min_clients:
            return cls(Figures(), {})
        return cls.of({name: Figures(**{f: facts[f"eval_{f}"] for f in fields}) for name, facts in sums.items()})

    @classmethod
    def of(cls, clients: Mapping[str, Figures]) -> "EvaluationReport":
        """The overall figures are the sum over clients."""
        overall = Figures()
        for name in sorted(clients):
            overall.add(clients[name])
        return cls(overall, {name: clients[name] for name in sorted(clients)})


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 48,
    generate_limit: int | None = None,
    batch_tokens: int = 4096,
    stop_ids: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Loss on every example, answers for the first `generate_limit` (all by default; none for max_new_tokens = 0).

    Rows of plain text have no prompt and get no answer. `progress` counts loss and answers as one piece of work each.
    """
    clients = {example.client or NOBODY: Figures() for example in examples}
    asked = [e for e in examples if len(e.prompt_ids)][:generate_limit] if max_new_tokens > 0 else []
    total = len(examples) + len(asked)
    for example in examples:
        clients[example.client or NOBODY].num_examples += 1
    _measure_loss(
        model, tokenizer, examples, clients, batch_tokens, lambda done: progress(done, total) if progress else None
    )
    if asked:
        _measure_answers(
            model,
            tokenizer,
            asked,
            clients,
            max_new_tokens,
            stop_ids,
            lambda done, _: progress(len(examples) + done, total) if progress else None,
        )
    report = EvaluationReport.of(clients)
    report.clients.pop(NOBODY, None)
    return report


def _measure_loss(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    clients: dict[str, Figures],
    batch_tokens: int,
    progress: Callable[[int], None],
) -> None:
    pad_id = tokenizer.pad_token_id or 0
    sums, counts = [0.0] * len(examples), [0] * len(examples)
    done = 0
    for batch in lay_out(examples, batch_tokens, pad_id, can_pack(model)):
        result = label_losses(model, batch)
        for row, loss in zip(result.rows.tolist(), result.losses.tolist(), strict=True):
            sums[row] += loss
            counts[row] += 1
        done += batch.num_examples
        progress(done)
    for example, loss, count in zip(examples, sums, counts, strict=True):  # in the order of examples, not of batches
        figures = clients[example.client or NOBODY]
        figures.loss_sum += loss
        figures.tokens += count


def _measure_answers(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    clients: dict[str, Figures],
    max_new_tokens: int,
    stop_ids: Sequence[int] | None,
    progress: Progress,
) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    prompts = [example.prompt_ids.tolist() for example in examples]
    answers = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens,
        stop_ids=stop_ids,
        progress=progress,
    )
    for example, answer in zip(examples, answers, strict=True):
        figures = clients[example.client or NOBODY]
        figures.generated += 1
        figures.exact += answer.strip() == example.reference.strip()
        figures.rouge_sum += scorer.score(example.reference, answer)["rougeL"].fmeasure
