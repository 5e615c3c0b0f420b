"""Signed messages: each passes once, at its place; resent, moved and altered ones are refused with their own reason."""

import dataclasses
import json
import threading
from types import SimpleNamespace

import pytest

from kilotune.core.errors import WireError
from kilotune.engine.flower.certificates import load_private, new_key, public_pem
from kilotune.engine.flower.client import _Loop
from kilotune.engine.flower.keys import init_server, read_join_file
from kilotune.engine.flower.messages import RECORD, SEAL, Reply, Request, decode_reply, decode_request, seal_of
from kilotune.engine.flower.seals import (
    FIXED,
    Reader,
    Seal,
    Statement,
    content_digest,
    reply_statement,
    request_statement,
    sign,
    verify,
)
from sealing import Ends, from_wire, to_wire

TRAIN = Request("train", {"round": 3, "rounds": 0, "head": "", "progress": 0.5, "last": False}, (b"down", b""))


@pytest.fixture
def ends(tmp_path):
    return Ends(tmp_path, "anna", "bert")


def refused(ends: Ends, name: str, raw: bytes) -> str:
    """The reason with which a client refuses a request it never hands on."""
    before = len(ends.handled)
    reply = decode_reply(from_wire(ends.reply(name, raw)))
    assert len(ends.handled) == before
    assert reply.error.startswith("request refused: ")
    return reply.error


def test_a_message_passes_once_and_a_copy_of_it_never(ends):
    """Kills: signatures that are made and not checked; a captured message that counts again."""
    request = ends.request("anna", TRAIN)
    reply = ends.reply("anna", request)
    assert ends.admit("anna", reply) == Reply({"round": 0, "head": ""}, (b"nwod", b""))
    assert ends.handled == [("anna", TRAIN)]
    assert "is a copy or came too late" in refused(ends, "anna", request)
    with pytest.raises(WireError, match="was answered before: this is a copy or too late"):
        ends.admit("anna", reply)


def test_an_overtaken_message_is_refused(ends):
    """Kills: remembering single messages instead of their order."""
    first, second = ends.request("anna", TRAIN), ends.request("anna", TRAIN)
    late = ends.posts["anna"].answer(from_wire(first)).message
    ends.reply("anna", second)
    assert "is a copy or came too late" in refused(ends, "anna", first)
    with pytest.raises(WireError, match=r"it answers request \d+, the open one is \d+"):
        ends.admit("anna", to_wire(late))


def test_a_reply_for_another_round_is_refused(ends):
    """Kills: an old update that counts in a later round."""
    old = ends.reply("anna", ends.request("anna", TRAIN))
    ends.desk.withdraw("anna")  # the round went on without it
    with pytest.raises(WireError, match="no request to 'anna' is open"):
        ends.admit("anna", old)
    ends.request("anna", dataclasses.replace(TRAIN, body={**TRAIN.body, "round": 4}))
    with pytest.raises(WireError, match=r"it answers request \d+, the open one is \d+"):
        ends.admit("anna", old)


def test_a_reply_to_another_kind_of_request_does_not_fit(ends):
    """Kills: a signature that does not cover what was asked for: the numbers alone may agree."""
    other = ends.server(1)
    reply = ends.reply("anna", ends.request("anna", Request("evaluate", TRAIN.body), other))
    ends.request("anna", Request("train", TRAIN.body))
    with pytest.raises(WireError, match="its signature does not fit"):
        ends.admit("anna", reply)


def test_messages_of_another_run_are_refused(ends):
    """Kills: a run of the same recipe and base whose updates count in this one."""
    other = ends.server(1, "ee" * 16)
    reply = ends.reply("anna", ends.request("anna", TRAIN, other))
    ends.request("anna", TRAIN)
    with pytest.raises(WireError, match="it belongs to run eeeeeeee, this is run 0f0f0f0f"):
        ends.admit("anna", reply)


def test_messages_of_another_client_are_refused(ends):
    """Kills: one client speaking or listening for another."""
    request = ends.request("anna", TRAIN)
    assert "it is meant for client 'anna', this is 'bert'" in refused(ends, "bert", request)
    reply = ends.reply("anna", request)
    open_one = Seal.read(seal_of(from_wire(ends.request("bert", TRAIN))))
    with pytest.raises(WireError, match="it is a reply of client 'anna', brought by 'bert'"):
        ends.admit("bert", reply)
    message = from_wire(reply)
    seal = Seal.read(seal_of(message))
    message.content[RECORD][SEAL] = dataclasses.replace(seal, name="bert", number=open_one.number).to_bytes()
    with pytest.raises(WireError, match="its signature does not fit: not made by 'bert'"):
        ends.admit("bert", to_wire(message))


def test_unsigned_messages_are_refused(ends):
    """Kills: a check that is skipped where there is nothing to check."""
    request, reply = from_wire(ends.request("anna", TRAIN)), from_wire(ends.reply("anna", ends.request("anna", TRAIN)))
    for message in (request, reply):
        del message.content[RECORD][SEAL]
    assert "it is not signed" in refused(ends, "anna", to_wire(request))
    with pytest.raises(WireError, match="it is not signed"):
        ends.admit("anna", to_wire(reply))


def test_every_flipped_bit_of_a_seal_is_refused_in_both_directions(ends):
    """Kills: a field of the seal that no signature covers."""
    request = from_wire(ends.request("anna", TRAIN))
    reply = from_wire(ends.reply("anna", to_wire(request), sent=False))
    for message, check in ((request, lambda m: refused(ends, "anna", to_wire(m))), (reply, None)):
        whole = seal_of(message)
        for bit in range(8 * len(whole)):
            spoiled = bytearray(whole)
            spoiled[bit // 8] ^= 1 << bit % 8
            message.content[RECORD][SEAL] = bytes(spoiled)
            if check is not None:
                assert check(message)
            else:
                with pytest.raises(WireError, match=r"^(it|its|no request) "):
                    ends.admit("anna", to_wire(message))
        message.content[RECORD][SEAL] = whole
    assert ends.admit("anna", to_wire(reply)).error is None  # none of the wrong ones took its place


CHANGES = [
    lambda record: record.update({"b.round": 4}),
    lambda record: record.update({"b.head": "00" * 32}),
    lambda record: record.update({"b.extra": 1}),
    lambda record: record.update({"p.0": b"dowN"}),
    lambda record: record.update({"count": record["count"] + 1}),
    lambda record: record.update({"p.0": b"", "p.1": record["p.0"]}) or record.pop("p.0"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_altered_content_is_refused_in_both_directions(ends, change):
    """Kills: facts or payloads outside of the digest; parts whose borders can be moved."""
    request = from_wire(ends.request("anna", TRAIN))
    reply = from_wire(ends.reply("anna", to_wire(request), sent=False))
    for message in (request, reply):
        record = message.content[RECORD]
        if "b.head" not in record and "blank" in record:
            record["blank"] = ""
            del record["blank"]
            record["b.head"] = "x"
        change(record)
    assert "its signature does not fit" in refused(ends, "anna", to_wire(request))
    with pytest.raises(WireError, match="its signature does not fit"):
        ends.admit("anna", to_wire(reply))


def test_the_same_question_after_a_restart_gets_the_same_answer_without_work(ends):
    """Kills: replay protection that mistakes a restarted server's honest question for a copy."""
    first = ends.reply("anna", ends.request("anna", TRAIN))
    restarted = ends.server(2)
    again = ends.reply("anna", ends.request("anna", TRAIN, restarted))
    assert decode_reply(from_wire(again)) == decode_reply(from_wire(first))
    assert ends.admit("anna", again, restarted).error is None
    assert len(ends.handled) == 1


def test_a_reply_that_was_broken_off_may_be_asked_for_again(ends):
    """Kills: a client stopped while it sends, which refuses the same request for ever after its restart."""
    stop = threading.Event()
    link = SimpleNamespace(push=lambda message: stop.set(), heartbeat=lambda: None)
    join = read_join_file(ends.keys.join_path("anna"))
    raw = ends.request("anna", TRAIN)
    _Loop(link, join, ends.posts["anna"], ends.events.append, stop)._answer(from_wire(raw))
    assert ends.admit("anna", ends.reply("anna", raw)).error is None


def test_a_server_with_another_key_or_of_another_federation_is_refused(ends):
    """Kills: trusting the certificate's issuer alone; keys that serve two federations at once."""
    statement_key, stranger = ends.keys.signing_key(), new_key()
    request = from_wire(ends.request("anna", TRAIN))
    seal = Seal.read(seal_of(request))
    decoded = decode_request(request)
    for key, federation in ((stranger, ends.keys.federation), (statement_key, "another")):
        said = request_statement(federation, seal, "train", decoded)
        request.content[RECORD][SEAL] = dataclasses.replace(seal, signature=sign(key, said)).to_bytes()
        assert "not made by the server of the join file" in refused(ends, "anna", to_wire(request))


def test_all_fields_of_a_statement_are_signed():
    """Kills: a field that is compared nowhere and signed nowhere."""
    key = new_key()
    said = Statement("fed", "00" * 16, 1, "", "anna", "train", 1, 0, "", "aa" * 32)
    signature = sign(key, said)
    assert verify(key.public_key(), said, signature)
    assert json.loads(said.to_bytes()[len(b"kilotune-message-1") :]) == dataclasses.asdict(said)
    for field in dataclasses.fields(Statement):
        other = getattr(said, field.name)
        other = other + (1 if isinstance(other, int) else "x")
        assert not verify(key.public_key(), dataclasses.replace(said, **{field.name: other}), signature), field.name
    for wrong in (b"", signature[:-1], bytes(64), b"\xff" * 64):
        assert not verify(key.public_key(), said, wrong)


def test_contents_that_differ_have_different_digests():
    """Kills: true that equals 1; an int that equals a float; facts that run into each other; a lost empty payload."""
    contents = [
        Reply({}),
        Reply({"a": 1}),
        Reply({"a": True}),
        Reply({"a": 1.0}),
        Reply({"a": "1"}),
        Reply({"a": "", "b": ""}),
        Reply({"ab": ""}),
        Reply({}, (b"",)),
        Reply({}, (b"", b"")),
        Reply({}, (b"ab", b"c")),
        Reply({}, (b"a", b"bc")),
    ]
    assert len({content_digest(c) for c in contents} | {content_digest(contents[0], "")}) == len(contents) + 1
    assert content_digest(Reply({"a": 1, "b": 2})) == content_digest(Reply({"b": 2, "a": 1}))


def test_a_seal_costs_what_the_documentation_says(ends):
    """Kills: a seal that grows unnoticed."""
    assert FIXED == 88
    assert len(seal_of(from_wire(ends.request("anna", TRAIN)))) == 88 + len("anna")


def test_a_reply_names_what_it_answers(ends):
    """Kills: a reply that could be moved between requests of equal content."""
    asked = Statement("fed", "00" * 16, 5, "", "anna", "train", 2, 1, "aa", "bb")
    said = reply_statement(asked, Reply({"round": 1, "head": "aa"}), None)
    assert (said.number, said.round, said.kind) == (5, 2, "train reply")
    assert (said.sender, said.recipient, said.rounds, said.head) == ("anna", "", 1, "aa")


def test_a_reader_needs_the_key_of_a_server(tmp_path):
    """Kills: any file with a PEM block taken for a key."""
    keys = init_server(tmp_path, "127.0.0.1", 1, ["a"])
    private = load_private(keys.key.read_bytes())
    with pytest.raises(ValueError, match=r"(?i)pem|key"):
        Reader("fed", "a", private, b"junk")
    assert public_pem(private).startswith(b"-----BEGIN PUBLIC KEY")
