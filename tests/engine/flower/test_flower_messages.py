"""Requests and replies survive Flower's own serialization, and nothing else is accepted."""

import math

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from kilotune.core.errors import WireError
from kilotune.engine.flower.messages import (
    Reply,
    Request,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)

BODIES = [
    {},
    {"round": 3, "recipe": "a1b2c3", "lr": 1e-3, "last": False},
    {"note": "", "other": "", "b.count": -(2**63), "big": 2**63 - 1, "text": "ü\n\t"},
]
PAYLOADS = [(), (b"",), (b"\0" * 4300,), (b"one", b"", b"three", b"")]


def over_the_wire(message: Message) -> Message:
    return message_from_proto(ProtoMessage.FromString(message_to_proto(message).SerializeToString()))


def sent(request: Request) -> Message:
    return encode_request(request, run_id=7, node_id=9, message_id="ab" * 32, created_at=1.8e9)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("payloads", PAYLOADS)
def test_a_request_and_its_reply_come_out_as_they_went_in(body, payloads):
    """Kills: empty payloads lost or moved; empty text lost; bool turned into int; payloads out of order."""
    request = Request("train", body, payloads)
    arrived = over_the_wire(sent(request))
    assert decode_request(arrived) == request
    assert {k: type(v) for k, v in decode_request(arrived).body.items()} == {k: type(v) for k, v in body.items()}
    reply = Reply(body, payloads, None)
    assert decode_reply(over_the_wire(encode_reply(reply, arrived))) == reply


def test_more_than_nine_payloads_keep_their_order():
    """Kills: sorting payload keys as text."""
    payloads = tuple(bytes([n]) for n in range(25))
    assert decode_request(over_the_wire(sent(Request("evaluate", {}, payloads)))).payloads == payloads


def test_flower_can_count_the_bytes_of_every_message():
    """Kills: an empty value in a record, at which Flower's count_bytes raises."""
    for kind in ("hello", "train", "evaluate", "finish"):
        message = sent(Request(kind, {"note": ""}, (b"", b"x")))
        assert sum(record.count_bytes() for record in message.content.values()) > 0


def test_numbers_that_are_not_finite_survive():
    """Kills: text formats that have no NaN."""
    body = decode_request(over_the_wire(sent(Request("train", {"loss": math.nan, "top": math.inf})))).body
    assert math.isnan(body["loss"])
    assert body["top"] == math.inf


def test_an_error_reply_keeps_its_text_and_flowers_own_errors_become_one():
    """Kills: dropping the error; taking a Flower error for a reply without content."""
    request = sent(Request("train"))
    assert decode_reply(over_the_wire(encode_reply(Reply({"at": 2}, (), "no data"), request))).error == "no data"
    assert decode_reply(over_the_wire(encode_reply(Reply(error=""), request))).error == "unnamed error"
    assert decode_reply(over_the_wire(Message(Error(3, "node gone"), reply_to=request))).error == "node gone"


@pytest.mark.parametrize(
    "record, complaint",
    [
        ({}, "kind None"),
        ({"kind": "train"}, "count is None"),
        ({"kind": "train", "count": True}, "count is True"),
        ({"kind": "train", "count": -1}, "count is -1"),
        ({"kind": "train", "count": 1 << 40}, "count is"),
        ({"kind": "evaluate", "count": 0}, "kind 'evaluate' in a message of type 'train'"),
        ({"kind": "exec", "count": 0}, "kind 'exec'"),
        ({"kind": b"train", "count": 0}, "kind b'train'"),
        ({"kind": "train", "count": 1, "p.1": b"x"}, "unexpected entry 'p.1'"),
        ({"kind": "train", "count": 1, "p.-1": b"x"}, "unexpected entry 'p.-1'"),
        ({"kind": "train", "count": 1, "p.0": "text"}, "unexpected entry 'p.0'"),
        ({"kind": "train", "count": 0, "b.x": b"bytes"}, "unexpected entry 'b.x'"),
        ({"kind": "train", "count": 0, "b.x": [1, 2]}, "unexpected entry 'b.x'"),
        ({"kind": "train", "count": 0, "code": "print()"}, "unexpected entry 'code'"),
        ({"kind": "train", "count": 0, "blank": 3}, "blank is a int"),
        ({"kind": "train", "count": 0, "blank": "x", "b.x": 1}, "unexpected entry 'b.x'"),
    ],
)
def test_a_malformed_record_is_refused(record, complaint):
    """Kills: accepting keys, types or counts this version never writes."""
    message = sent(Request("train"))
    message.content = RecordDict({"kilotune": ConfigRecord(record)})
    with pytest.raises(WireError, match=complaint.replace("(", r"\(")):
        decode_request(over_the_wire(message))


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"other": ConfigRecord({"count": 0})}),
        RecordDict({"kilotune": ArrayRecord()}),
        RecordDict({"kilotune": ConfigRecord({"count": 0}), "more": ConfigRecord()}),
    ],
)
def test_any_other_set_of_records_is_refused(content):
    """Kills: ignoring what is not understood."""
    message = sent(Request("train"))
    message.content = content
    with pytest.raises(WireError, match="expected"):
        decode_request(message)
    with pytest.raises(WireError, match="expected"):
        decode_reply(message)


@pytest.mark.parametrize(
    "request_",
    [
        Request("exec"),
        Request("train", {"": 1}),
        Request("train", {"two\nlines": 1}),
        Request("train", {"list": [1]}),
        Request("train", {"none": None}),
        Request("train", {"huge": 2**63}),
        Request("train", {}, ("text",)),
    ],
)
def test_what_the_wire_cannot_carry_is_refused_before_sending(request_):
    """Kills: values that only fail deep inside protobuf."""
    with pytest.raises(WireError, match="got"):
        sent(request_)
