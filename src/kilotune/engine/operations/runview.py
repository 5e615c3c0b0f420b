"""RunView: the state of a run, folded from its events one by one.

The events are the only source, so a page, a scrape and a log line never disagree, and a server that goes on after a
restart knows what went before from its metrics.jsonl. An event of an unknown kind changes nothing but the privacy
spent, which is taken from any event that carries it. Losses of single clients are never kept.
"""

import math
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from kilotune.core.lines import clean

KEPT_ROUNDS = 1000
KEPT_REFUSALS = 100
WHY_LENGTH = 240
EPSILON, DELTA = ("epsilon", "dp_epsilon"), ("delta", "dp_delta")
BUDGET = ("epsilon_budget", "target_epsilon", "budget")

REASONS: tuple[tuple[str, str], ...] = (  # class, what its messages say; the first that fits, "other" if none
    ("gate", r"\bgate\b"),
    ("recipe", r"\brecipes? [0-9a-f]|same recipe"),
    ("base", r"\bbase\b"),
    ("replay", r"\bcopy\b|same payload|earlier round|twice|answered before|replay"),
    ("identity", r"signature|\bseal\b|\bsigned\b|certificate|enrolled|\bkeys?\b|in the name of|brought by|meant for"),
    ("history", r"stale|foreign|\bhead\b|history|belongs to run|another round|is open|answers request"),
    ("bound", r"no loss can give|\bnorm\b|outlier|median|\bbound"),
    ("values", r"finite|\bnan\b|infinity|no examples|as numbers|out of range"),
    ("payload", r"payload|\bpairs?\b|\bdirections?\b|tensors|\bbytes\b|header|magic|message|understood"),
    ("secure", r"secure aggregation"),
    ("rows", r"\brows?\b"),
)
INCIDENTS = ("refused", "error", "astray")  # statuses of a client that an operator should look at
REASON_CLASSES = (*(name for name, _ in REASONS), "other")


def reason_class(why: str) -> str:
    """A refusal's text as one of a few words, so that metrics have a bounded number of series."""
    return next((name for name, pattern in REASONS if re.search(pattern, why, re.IGNORECASE)), "other")


@dataclass
class ClientView:
    """One client as the server has met it."""

    status: str = "away"  # away, joined, ok, missing, refused, error, astray
    rounds: int = 0  # in which its answer counted
    examples: int | None = None
    up_bytes: int = 0
    seconds: float | None = None  # of its last answer
    peak_rss_bytes: int = 0
    refusals: int = 0
    last_seen: float | None = None
    why: str = ""


@dataclass
class Totals:
    """Sums over everything folded so far. Bytes are those of finished rounds, evaluations and farewells."""

    up_bytes: int = 0
    down_bytes: int = 0
    answers: int = 0  # that counted
    missing: int = 0
    rejected: int = 0  # rounds that the gate turned into a change of zero
    rounds: int = 0  # whose time is in round_seconds
    round_seconds: float = 0.0
    refusals: Counter[str] = field(default_factory=Counter)


class RunView:
    """Fold events with `fold`, read with `snapshot`; both from any thread."""

    def __init__(
        self,
        facts: Mapping[str, str],
        planned: int | None,
        clients: Iterable[str] = (),
        privacy: Mapping[str, float] | None = None,
    ) -> None:
        """`facts` stand on the page as they are (recipe id, base); `planned` rounds; `clients` enrolled by name;
        `privacy` the recipe's budget and delta."""
        self.facts, self.planned = dict(facts), planned
        self.version = 0
        self._lock = threading.Lock()
        self._clients = {name: ClientView() for name in clients}
        self._totals = Totals()
        self._phase, self._activity, self._problem = "starting", "", ""
        self._round = 0
        self._last_round_at: float | None = None
        self._updated_at: float | None = None
        self._rounds: deque[dict[str, Any]] = deque(maxlen=KEPT_ROUNDS)
        self._quality: list[dict[str, Any]] = []
        self._refusals: deque[dict[str, Any]] = deque(maxlen=KEPT_REFUSALS)
        self._privacy: dict[str, float] = dict(privacy or {})
        self._answered: set[str] = set()  # in the round that is under way
        self._rejected = 0  # the last round that the gate objected to
        self._defences: dict[str, float] = {}

    @property
    def problem(self) -> str:
        """Why the last round failed; empty when it did not."""
        return self._problem

    def resume(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Fold what an earlier process of this run has recorded. Nobody is connected yet and nothing runs."""
        for event in events:
            self.fold(event)
        with self._lock:
            self._phase, self._activity, self._problem = "starting", "", ""
            for client in self._clients.values():
                client.status = "away"

    def fold(self, event: Mapping[str, Any]) -> None:
        """Take one event in. Its time is its own (`time`, as recorded) or now."""
        handler = getattr(self, f"_on_{event.get('event')}", None)
        with self._lock:
            self._updated_at = float(event.get("time", time.time()))
            self._spend(event)
            if handler is not None:
                handler(event)
            self.version += 1

    def snapshot(self) -> dict[str, Any]:
        """The state as plain values, which nothing changes afterwards; the page and the metrics are made from it."""
        with self._lock:
            totals = asdict(self._totals)
            totals["refusals"] = dict(sorted(self._totals.refusals.items()))
            return {
                "facts": dict(self.facts),
                "phase": self._phase,
                "activity": self._activity,
                "problem": self._problem,
                "round": self._round,
                "planned": self.planned,
                "updated_at": self._updated_at,
                "last_round_at": self._last_round_at,
                "totals": totals,
                "clients": {name: asdict(client) for name, client in sorted(self._clients.items())},
                "rounds": [dict(entry) for entry in self._rounds],
                "quality": [dict(entry) for entry in self._quality],
                "refusals": [dict(entry) for entry in self._refusals],
                "privacy": dict(self._privacy),
                "defences": dict(self._defences),
            }

    # -- events -----------------------------------------------------------------------------------------------

    def _on_status(self, event: Mapping[str, Any]) -> None:
        self._activity = clean(event["text"], WHY_LENGTH)
        name, _, what = self._activity.rpartition(" ")  # the exchange says "NAME joined", "NAME left"
        if name in self._clients and what in ("joined", "left"):
            self._clients[name].status = "joined" if what == "joined" else "away"
            self._clients[name].last_seen = self._updated_at

    def _on_progress(self, event: Mapping[str, Any]) -> None:
        done = f" {event['done']}/{event['total']}" if "total" in event else ""
        self._activity = clean(event["what"], WHY_LENGTH) + done

    def _on_clients(self, event: Mapping[str, Any]) -> None:
        for name, rows in event["rows"].items():
            self._client(name).examples = int(rows)

    def _on_client(self, event: Mapping[str, Any]) -> None:
        client, status = self._client(str(event["client"])), str(event["status"])
        client.status, client.why = status, clean(event.get("why", ""), WHY_LENGTH)
        if status == "missing":
            self._totals.missing += 1
            return
        client.last_seen = self._updated_at
        client.examples = event.get("num_examples", client.examples)
        client.peak_rss_bytes = max(client.peak_rss_bytes, int(event.get("peak_rss_bytes", 0)))
        self._answered.discard(str(event["client"]))
        if status in INCIDENTS:
            client.refusals += 1
            self._note(event, client.why)
        elif status == "ok":
            client.up_bytes += int(event.get("up_bytes", 0))
            client.seconds = event.get("seconds", client.seconds)
            self._answered.add(str(event["client"]))
            self._run()

    def _on_rejected(self, event: Mapping[str, Any]) -> None:
        self._totals.rejected += 1
        self._rejected = int(event["round"])
        self._problem = f"round {self._rejected} changes nothing: {clean(event['why'], WHY_LENGTH)}"
        self._note(event, f"the whole round: {clean(event['why'], WHY_LENGTH)}")

    def _on_guard(self, event: Mapping[str, Any]) -> None:
        keys = ("clipped_scalars", "clipped_norms", "capped_weights")
        self._defences = {key: float(event[key]) for key in keys if key in event}

    def _note(self, event: Mapping[str, Any], why: str) -> None:
        reason = str(event.get("reason", ""))
        reason = reason if reason in REASON_CLASSES else reason_class(why)
        self._totals.refusals[reason] += 1
        client = clean(event.get("client", ""), WHY_LENGTH)
        told = {"at": self._updated_at, "round": event.get("round"), "client": client}
        self._refusals.append({**told, "reason": reason, "why": why})

    def _on_round(self, event: Mapping[str, Any]) -> None:
        self._run()
        self._round, self._last_round_at = int(event["round"]), self._updated_at
        if self._rejected != self._round:
            self._problem = ""
        self.facts["ledger head"] = str(event.get("head", ""))
        if event.get("secure") is not None:
            self.facts["aggregation"] = "secure: the server sees the sum only"
        for name in self._answered:
            self._client(name).rounds += 1
        self._answered.clear()
        counts = {key: int(event.get(key, 0)) for key in ("clients", "asked", "up_bytes", "down_bytes")}
        seconds, totals = float(event.get("seconds", 0.0)), self._totals
        totals.up_bytes += counts["up_bytes"]
        totals.down_bytes += counts["down_bytes"]
        totals.answers += counts["clients"]
        totals.rounds += 1
        totals.round_seconds += seconds
        kept = {"round": self._round, "loss": _finite(event.get("loss")), "seconds": seconds, **counts}
        if "epsilon" in self._privacy:
            kept["epsilon"] = self._privacy["epsilon"]
        self._rounds.append(kept)

    def _on_evaluation(self, event: Mapping[str, Any]) -> None:
        self._totals.down_bytes += int(event.get("down_bytes", 0))
        self._activity = ""
        overall = event["overall"]
        figures = {key: _finite(overall.get(key)) for key in ("loss", "exact_match", "rouge_l")}
        self._quality.append({"round": int(event.get("round", event.get("step", 0))), **figures})

    def _on_finishing(self, event: Mapping[str, Any]) -> None:
        self._phase = "finishing"
        self._totals.down_bytes += int(event.get("down_bytes", 0))

    def _on_end(self, event: Mapping[str, Any]) -> None:
        self._phase, self._activity = "finished", ""
        self.facts["weights"] = str(event.get("digest", ""))

    def _on_stopped(self, event: Mapping[str, Any]) -> None:
        self._activity = f"stopped early: {clean(event.get('why', ''), WHY_LENGTH)}"

    def _on_stopping(self, event: Mapping[str, Any]) -> None:
        self._phase = "stopping"

    def _on_failed(self, event: Mapping[str, Any]) -> None:
        self._phase, self._problem = "failed", clean(event.get("why", ""), WHY_LENGTH)

    def _run(self) -> None:
        self._phase = "running" if self._phase == "starting" else self._phase

    # -- pieces -----------------------------------------------------------------------------------------------

    def _client(self, name: str) -> ClientView:
        return self._clients.setdefault(clean(name, WHY_LENGTH), ClientView())

    def _spend(self, event: Mapping[str, Any]) -> None:
        for key, names in (("epsilon", EPSILON), ("delta", DELTA), ("budget", BUDGET)):
            for name in names:
                value = event.get(name)
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._privacy[key] = float(value)


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
