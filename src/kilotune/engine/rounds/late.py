"""Late: answers that come after their round, and what they still count for.

With `staleness.max` s, a client that has not answered when its round ends keeps its request and goes on working; it is
asked nothing else meanwhile. Its answer counts in the round that is open when it arrives, at most s rounds later, with
(1 + rounds late)^-power of the weight it would have had: an update along directions that are the same all run is as
good as it was, for a state the run has left.

Source: Xie et al., "Asynchronous Federated Optimization", arXiv 1903.03934: the polynomial discount of FedAsync.
Departs: rounds stay, and late answers join the ones of the round; FedAsync mixes every answer in as it comes.
"""

from collections.abc import Generator
from dataclasses import dataclass

from kilotune.core.errors import WireError
from kilotune.engine.composing.recipe import Recipe
from kilotune.engine.flower.messages import Exchange, Reply, Request
from kilotune.engine.rounds.ledger import Ledger
from kilotune.engine.training.step import rate


@dataclass(frozen=True)
class Lateness:
    """What the rounds of one run say of an answer that is late."""

    recipe: Recipe
    ledger: Ledger

    def rounds(self, number: int, held: int, head: str | None) -> int:
        """How late an answer of round `number` is: it stands on `held` rounds and their head (None: known to fit).

        Raises WireError when it is of no use any more.
        """
        late = number - 1 - held
        if 0 <= late <= self.recipe.staleness.max and head in (None, self.ledger.head_at(held)):
            return late
        raise WireError(f"stands at round {held}, head {(head or '')[:16]!r}: a stale or foreign answer")

    def discount(self, late: int) -> float:
        """What is left of the weight of an answer that is so many rounds late."""
        return float((1 + late) ** -self.recipe.staleness.power)

    def factor(self, number: int) -> float:
        """What the schedule multiplies learning rates with in a round."""
        return rate(self.recipe.lr_schedule, self.recipe.warmup_frac, (number - 1) / (self.recipe.rounds or 1))


class AtWork:
    """Clients whose requests outlive their round."""

    def __init__(self, exchange: Exchange, most: int) -> None:
        """`most`: rounds that a request may outlive; 0: none does."""
        self._exchange, self._most = exchange, most
        self.on: dict[str, int] = {}  # client -> round it works on

    def answers(self, requests: dict[str, Request], deadline_s: float) -> Generator[tuple[str, Reply], None, None]:
        """The replies to these requests, and those to earlier ones that come meanwhile."""
        if self._most:
            yield from self._exchange.exchange(requests, deadline_s, keep=True)
        else:
            yield from self._exchange.exchange(requests, deadline_s)

    def begin(self, number: int) -> None:
        """A round starts: answers that would be too late by now are not waited for any more."""
        self.drop([client for client, asked in self.on.items() if number - asked > self._most])

    def end(self, number: int) -> None:
        """A round is collected: who has not answered goes on."""
        if self._most:
            self.on = {client: self.on.get(client, number) for client in self._exchange.kept()}

    def drop(self, clients: list[str]) -> None:
        """Take the requests to these clients back."""
        if clients:
            self._exchange.give_up(clients)
        for client in clients:
            self.on.pop(client, None)
