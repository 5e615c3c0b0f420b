"""Simulation: thousands of clients in one process, over one resident model.

A client that is not asked is a name, how far it follows the ledger, and its rows as they came. A worker is made when
a request arrives and forgotten after the reply; rows are tokenised when they are trained on, and only a bounded
number of them stays tokenised.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

from kilotune.engine.flower.messages import Handler, Reply, Request
from kilotune.engine.partial.splitclient import split_client
from kilotune.engine.rounds.clientstate import RoundLog
from kilotune.engine.rounds.following import head_after
from kilotune.engine.rounds.ledger import Ledger
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rounds.worker import Evaluate, Worker
from kilotune.engine.rows.data import Row
from kilotune.engine.rows.tokenize import Example
from kilotune.engine.secure.client import Vault
from kilotune.engine.secure.participant import new_vault

Emit = Callable[[dict[str, Any]], None]
Encode = Callable[[list[Row], str], list[Example]]
"""(rows, client) -> examples."""

KEPT_ROWS = 4096  # tokenised rows in memory: some ten megabytes


class Simulation:
    """Answers for every client of a run."""

    def __init__(
        self,
        replica: Replica,
        ledger: Ledger,
        rows: "PackedRows",
        encode: Encode,
        evaluate: Evaluate,
        folder: Path,
        emit: Emit,
    ) -> None:
        """Few rows are tokenised here, so that a mistake in one of them ends the run before it begins."""
        self._replica, self._rows, self._encode = replica, rows, encode
        self._evaluate, self._emit, self._folder = evaluate, emit, folder
        self._ledger, self._genesis = ledger, ledger.header.hash
        self._split = split_client(replica)
        self._standings = standings(ledger)
        # Where the guard has every answer written into the server's book, that spares the same work after a crash; an
        # answer with a client's own noise may not be made a second time, so it is written before it leaves.
        plan = replica.plan
        self._log = RoundLog(folder / "state", writes=not plan.recipe.defences.enabled or plan.privacy is not None)
        self._attempt, self._vaults = "", dict[str, Vault]()  # of secure aggregation, for one attempt at a round
        self._examples: OrderedDict[str, list[Example]] = OrderedDict()  # the last ones in use
        self._num_kept = 0
        if sum(rows.counts.values()) <= KEPT_ROWS:
            for name in rows.counts:
                self.examples(name)

    def handlers(self) -> dict[str, Handler]:
        """Who answers, by client."""
        return {name: partial(self._handle, name) for name in self._rows.counts}

    def examples(self, client: str) -> list[Example]:
        """The client's rows as tokens. Raises DataError for a row that cannot be learnt."""
        if client in self._examples:
            self._examples.move_to_end(client)
            return self._examples[client]
        examples = self._examples[client] = self._encode(self._rows.of(client), client)
        self._num_kept += len(examples)
        while self._num_kept > KEPT_ROWS and len(self._examples) > 1:
            self._num_kept -= len(self._examples.popitem(last=False)[1])
        return examples

    def _handle(self, client: str, request: Request) -> Reply:
        worker = Worker(
            client,
            self._replica,
            self._genesis,
            _Later(self._rows.counts[client], partial(self.examples, client)),
            [],
            self._evaluate,
            self._folder / "clients" / client,
            keeps_rounds=False,
            progress=lambda line: self._emit({"event": "progress", "what": f"{client}: {line}"}),
            log=self._log,
            link=self._link,
            vault=self._vault(client, request),
            split=self._split,
        )
        worker.round, worker.head = self._standings.get(client, (0, self._genesis))
        reply = worker.handle(request)
        self._standings[client] = (worker.round, worker.head)
        return reply

    def _vault(self, client: str, request: Request) -> Vault | None:
        """The client's secrets of the attempt that is going on."""
        attempt = str(request.body.get("attempt", ""))
        if not attempt:
            return None
        if attempt != self._attempt:
            self._attempt, self._vaults = attempt, {}
        if client not in self._vaults:
            self._vaults[client] = new_vault(self._replica.plan, self._genesis, client, None)
        return self._vaults[client]

    def _link(self, number: int, head: str, part: bytes) -> str:
        """All clients are handed the ledger's own bytes, whose hash it knows."""
        if self._ledger.holds(number, part) and self._ledger.records[number - 1].previous == head:
            return self._ledger.records[number - 1].hash
        return head_after(self._replica.plan, number, head, part)


def standings(ledger: Ledger) -> dict[str, tuple[int, str]]:
    """(rounds held, head) of every client when an interrupted run goes on: what it held when it last trained."""
    return {c.client: (r.round - 1, r.previous) for r in ledger.records for c in r.contributions}


class PackedRows:
    """Rows by client. Many of them are kept as one line of text per client: dictionaries take ten times the space."""

    def __init__(self, clients: dict[str, list[Row]]) -> None:
        self.counts = {name: len(rows) for name, rows in clients.items()}
        pack = sum(self.counts.values()) > KEPT_ROWS
        self._rows = {name: _packed(rows) if pack else rows for name, rows in clients.items()}

    def of(self, client: str) -> list[Row]:
        """The client's rows, in order."""
        rows = self._rows[client]
        if isinstance(rows, list):
            return rows
        return [Row(record, file, line, client, split) for record, file, line, client, split in json.loads(rows)]


def _packed(rows: list[Row]) -> bytes | list[Row]:
    """The rows as JSON, or as they are when they hold what JSON cannot say."""
    content = [[row.record, row.file, row.line, row.client, row.split] for row in rows]
    try:
        return json.dumps(content, separators=(",", ":")).encode()
    except (TypeError, ValueError):
        return rows


class _Later(Sequence[Example]):
    """A list whose length is known and whose content is made when it is needed."""

    def __init__(self, length: int, make: Callable[[], list[Example]]) -> None:
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        return self._make()[index]
