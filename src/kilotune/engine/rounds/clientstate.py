"""Client state: what a client remembers from round to round, and the answers a resumed run need not compute again.

A client of its own keeps one file per round. Simulated clients that remember nothing share one file for the round
under way, because ten thousand of them need no folders: after a crash it spares work, and without it the same answers
are computed again.
"""

from pathlib import Path

import torch

from kilotune.core.types import State
from kilotune.engine.files import read_tensors, write_tensors
from kilotune.engine.rounds.book import Entry, append_entry, cut_after, read_entries
from kilotune.engine.training.step import Memory

Facts = dict[str, str | int | float]
Answer = tuple[bytes, Facts]


class ClientState:
    """`folder`/state-NNNNN.safetensors: moments, residuals and the answer of a round; the last two are kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rounds = sorted(int(path.stem.split("-")[1]) for path in folder.glob("state-*.safetensors"))

    def __bool__(self) -> bool:
        """Whether anything is kept."""
        return bool(self._rounds)

    def answer(self, number: int, head: str) -> Answer | None:
        """What was answered in this round after this history."""
        if number not in self._rounds:
            return None
        tensors, facts = read_tensors(self._path(number))
        if facts.get("head") != head:
            return None
        return tensors["reply"].numpy().tobytes(), {k: float(v) for k, v in facts.items() if k != "head"}

    def before(self, number: int) -> tuple[Memory, State]:
        """What earlier rounds left."""
        earlier = [n for n in self._rounds if n < number]
        if not earlier:
            return Memory.empty(), {}
        tensors, _ = read_tensors(self._path(earlier[-1]))
        codec = {k.removeprefix("codec/"): v for k, v in tensors.items() if k.startswith("codec/")}
        return Memory.from_tensors(tensors), codec

    def save(self, number: int, head: str, remembered: State, answer: Answer) -> None:
        """The state after a round; the one before the last goes."""
        payload, facts = answer
        tensors = remembered | {"reply": torch.frombuffer(bytearray(payload), dtype=torch.uint8)}
        write_tensors(self._path(number), tensors, {"head": head, **{k: repr(v) for k, v in facts.items()}})
        for old in [n for n in self._rounds if n < number][:-1]:
            self._path(old).unlink()
            self._rounds.remove(old)
        self._rounds = sorted({*self._rounds, number})

    def _path(self, number: int) -> Path:
        return self._folder / f"state-{number:05d}.safetensors"


class RoundLog:
    """`folder`/answers-NNNNN.bin: a round's answers in the form of the server's book. Written without waiting for the
    disk: the end of a process loses nothing, a power cut the answers of one unfinished round."""

    def __init__(self, folder: Path, writes: bool = True) -> None:
        """`writes` False: somebody else keeps these answers; those of an earlier process are found all the same."""
        self._folder, self._writes = folder, writes
        self._number = 0
        self._found: dict[str, tuple[str, Answer]] = {}  # of an earlier process, by client

    def answer(self, client: str, number: int, head: str) -> Answer | None:
        """What a process before this one had answered in this round after this history."""
        self._enter(number)
        found = self._found.get(client)
        return found[1] if found is not None and found[0] == head else None

    def add(self, client: str, number: int, head: str, answer: Answer) -> None:
        """Keep an answer until the next round begins."""
        self._enter(number)
        payload, facts = answer
        if self._writes:
            append_entry(self._path(number), Entry(client, head, dict(facts), payload))

    def _enter(self, number: int) -> None:
        if number == self._number:
            return
        self._number, self._found = number, {}
        for path in self._folder.glob("answers-*.bin"):
            if path != self._path(number):
                path.unlink()
        if self._path(number).exists():
            self._read(self._path(number))

    def _read(self, path: Path) -> None:
        """Whole entries; what a crash has cut goes, so that new ones follow the last whole one."""
        end = 0
        for entry, start in read_entries(path):
            facts: Facts = dict(entry.facts)
            self._found[entry.client] = (entry.head, (entry.payload, facts))
            end = start + len(entry.payload)
        cut_after(path, end)

    def _path(self, number: int) -> Path:
        return self._folder / f"answers-{number:05d}.bin"
