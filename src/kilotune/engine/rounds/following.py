"""Following: how a client follows the rounds of its server's ledger, from what it holds to what it is sent.

A part is what a client needs of a round: the hash of its members and its payload, from which the head follows.
"""

from collections.abc import Callable
from pathlib import Path

from kilotune.core.errors import FederationError, WireError
from kilotune.engine.composing.plan import Plan
from kilotune.engine.files import write_bytes
from kilotune.engine.flower.messages import Request
from kilotune.engine.rounds.bounds import said_by
from kilotune.engine.rounds.clientstate import Answer
from kilotune.engine.rounds.identity import HistoryError
from kilotune.engine.rounds.ledger import MEMBERS_BYTES, link
from kilotune.engine.rounds.replica import Replica

Part = tuple[int, bytes]
"""(round, its part)."""
Link = Callable[[int, str, bytes], str]
"""(round, head before, part) -> head after."""
Held = tuple[int, str]
"""(last round, head after it)."""


def head_after(plan: Plan, number: int, head: str, part: bytes) -> str:
    """The ledger's head after a round of which this part was received."""
    return link(head, number, plan.root(number), part[:MEMBERS_BYTES], part[MEMBERS_BYTES:])


def require_same_run(client: str, replica: Replica, request: Request) -> None:
    """Raises FederationError when the server asks for another recipe or base."""
    ours, theirs = replica.plan.id, str(request.body.get("recipe_id", ""))
    if ours != theirs:
        raise FederationError(
            f"client {client!r} follows recipe {ours}, the server recipe {theirs}. Use the same recipe file."
        )
    base = str(request.body.get("base_digest", ""))
    if base != replica.base.digest:
        raise FederationError(
            f"client {client!r} has base {replica.base.digest[:16]}, the server {base[:16]}. Use the same base model."
        )


def missed_parts(client: str, held: Held, sent: list[Part], wanted: str, link: Link) -> list[Part]:
    """Of the parts that were sent those that this client lacks. Raises WireError when they do not lead to `wanted`."""
    last, head = held
    missed = [(number, part) for number, part in sent if number > last]
    for expected, (number, part) in enumerate(missed, start=last + 1):
        if number != expected:
            raise WireError(f"client {client!r} holds round {last} and cannot go on with round {number}.")
        head = link(number, head, part)
    if head != wanted:
        raise WireError(
            f"client {client!r} comes to ledger head {head[:16]} after round {last + len(missed)}, "
            f"the server {wanted[:16]}: their histories differ."
        )
    return missed


def require_own(client: str, replica: Replica, missed: list[Part], answered: Callable[[int], Answer | None]) -> None:
    """A round that lists its senders may leave a client out, but not say of it what it has not said.

    `answered`: what the client sent in a round; the last it took part in is the first that it misses. Raises
    HistoryError.
    """
    downlink = replica.plan.downlink
    for number, part in missed[:1] if "apart" in downlink.traits else ():
        answer, context = answered(number), said_by(client, replica.context(number))
        if answer is not None and not downlink.repeats(part[MEMBERS_BYTES:], answer[0], context):
            raise HistoryError(
                f"round {number} says of client {client!r} what it has not sent. Whoever relays the rounds has altered "
                "it; compare this round with other clients' before anybody goes on."
            )


# -- on disk ----------------------------------------------------------------------------------------------------------


def keep_parts(folder: Path, parts: list[Part]) -> None:
    """Write what was received, to follow it again after a restart."""
    for number, part in parts:
        write_bytes(_path(folder, number), part)


def kept_parts(folder: Path, held: Held, link: Link) -> tuple[list[Part], str]:
    """The parts kept here that go on from what is held, and the head they lead to."""
    (last, head), parts = held, list[Part]()
    while (path := _path(folder, last + len(parts) + 1)).exists():
        number, part = last + len(parts) + 1, path.read_bytes()
        try:
            head = link(number, head, part)
        except HistoryError:
            break  # the file was altered on this disk: the server is asked for it again
        parts.append((number, part))
    return parts, head


def _path(folder: Path, number: int) -> Path:
    return folder / "rounds" / f"{number:05d}.bin"
