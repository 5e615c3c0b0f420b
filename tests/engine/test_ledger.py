"""The ledger: append-only, chained, and suspicious."""

import json

import pytest

from kilotune.core.errors import RunError, WireError
from kilotune.engine.afterwards import seedfile
from kilotune.engine.rounds import ledger as ledger_module
from kilotune.engine.rounds.ledger import LEDGER, Contribution, Header, Ledger

HEADER = Header("tiny", "ab" * 32, "0123456789abcdef", 1, {"seed": 0})
PAYLOADS = [bytes([n]) * (10 + n) for n in range(4)]


def member(n: int) -> tuple[Contribution, ...]:
    return (Contribution(f"client{n}", 10 + n, 1.0, "00" * 32),)


def written(folder):
    ledger = Ledger.open(folder, HEADER)
    for n, payload in enumerate(PAYLOADS):
        ledger.append(1000 + n, payload, member(n))
    return ledger


def test_a_ledger_read_back_is_the_ledger_written(tmp_path):
    ledger = written(tmp_path)
    again = Ledger.load(tmp_path)
    assert again.head == ledger.head
    assert again.records == ledger.records
    assert [payload for _, payload in again.since(0)] == PAYLOADS
    assert [r.round for r, _ in again.since(2)] == [3, 4]


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_line_cut_by_a_crash_is_no_round_and_the_next_append_follows_the_last_whole_one(tmp_path, cut):
    """Kills: a resumed run that counts a half-written round, or that cannot start."""
    written(tmp_path)
    path = tmp_path / LEDGER
    path.write_bytes(path.read_bytes()[:-cut])
    ledger = Ledger.open(tmp_path, HEADER)
    assert len(ledger) == 3
    ledger.append(1003, PAYLOADS[3], member(3))
    assert len(Ledger.load(tmp_path)) == 4


@pytest.mark.parametrize("field", ["root", "round", "previous", "hash", "payload_sha256"])
def test_a_changed_record_breaks_the_chain(tmp_path, field):
    """Kills: a verification that checks payloads only."""
    written(tmp_path)
    path = tmp_path / LEDGER
    lines = path.read_text().splitlines()
    record = json.loads(lines[2])
    record[field] = record[field] + 1 if isinstance(record[field], int) else "00" * 32
    lines[2] = json.dumps(record)
    path.write_text("\n".join(lines) + "\n")
    if field == "payload_sha256":
        return  # it repeats what the hash already covers
    with pytest.raises(WireError, match="chain is broken"):
        Ledger.load(tmp_path)


def test_a_changed_payload_or_contribution_breaks_the_chain(tmp_path):
    written(tmp_path)
    (tmp_path / "payloads" / "00002.bin").write_bytes(b"other")
    with pytest.raises(WireError, match="chain is broken"):
        Ledger.load(tmp_path)
    (tmp_path / "payloads" / "00002.bin").write_bytes(PAYLOADS[1])
    path = tmp_path / LEDGER
    path.write_text(path.read_text().replace('"client1"', '"clientX"'))
    with pytest.raises(WireError, match="chain is broken"):
        Ledger.load(tmp_path)


def test_dropped_and_swapped_rounds_are_refused(tmp_path):
    written(tmp_path)
    path = tmp_path / LEDGER
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]) + "\n")
    with pytest.raises(WireError):
        Ledger.load(tmp_path)
    path.write_text("\n".join([*lines[:2], *lines[3:]]) + "\n")
    with pytest.raises(WireError):
        Ledger.load(tmp_path)


def test_a_folder_of_another_recipe_or_base_is_refused_with_both_ids(tmp_path):
    written(tmp_path)
    with pytest.raises(RunError, match="follows recipe 0123456789abcdef, got ffff"):
        Ledger.open(tmp_path, Header("tiny", "ab" * 32, "ffff", 1, {}))
    with pytest.raises(RunError, match="stands on base abababababababab, got cdcdcdcd"):
        Ledger.open(tmp_path, Header("tiny", "cd" * 32, HEADER.recipe_id, 1, {}))


def test_a_seed_file_holds_the_whole_ledger(tmp_path):
    ledger = written(tmp_path)
    size = seedfile.write(ledger, tmp_path / "final.seed")
    again = seedfile.read(tmp_path / "final.seed")
    assert (tmp_path / "final.seed").stat().st_size == size
    assert again.head == ledger.head
    assert [p for _, p in again.since(0)] == PAYLOADS


def test_every_cut_and_every_flipped_bit_of_a_seed_file_is_refused(tmp_path):
    """Kills: a seed file that is applied although it did not arrive whole."""
    raw = seedfile.pack(written(tmp_path))
    for length in range(0, len(raw), 37):
        with pytest.raises(WireError):
            seedfile.unpack(raw[:length], "x.seed")
    for place in range(0, len(raw), 23):
        changed = bytearray(raw)
        changed[place] ^= 1
        with pytest.raises(WireError):
            seedfile.unpack(bytes(changed), "x.seed")


def test_rounds_that_left_memory_are_read_from_disk(tmp_path, monkeypatch):
    """Kills: a server whose memory grows with the rounds; a part that is not the one the ledger's hash covers."""
    monkeypatch.setattr(ledger_module, "CACHE_BYTES", 100)
    ledger = written(tmp_path)
    assert sum(map(len, ledger._parts.values())) <= 100
    for number, payload in enumerate(PAYLOADS, 1):
        part = ledger.part(number)
        assert part == ledger.records[number - 1].members + payload
        assert ledger.holds(number, part)
        assert not ledger.holds(number, bytes(bytearray(part)))
    assert [payload for _, payload in ledger.since(0)] == PAYLOADS


def test_a_payload_that_vanished_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "CACHE_BYTES", 0)
    ledger = written(tmp_path)
    (tmp_path / "payloads" / "00001.bin").unlink()
    with pytest.raises(WireError, match=r"00001\.bin: missing"):
        ledger.payload(1)
