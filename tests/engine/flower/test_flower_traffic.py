"""Counting bytes: every byte lands in exactly one box, the right one."""

import asyncio

from kilotune.engine.flower.traffic import Meter, Relay, Traffic, Wire, dismiss, listen


def test_bytes_go_to_the_request_they_belong_to():
    """Kills: answer bytes booked on the next request; a held poll booked as idle although it brought a message."""
    meter, wire = Meter(lambda name: None), Wire()
    meter.sent(wire, 500), meter.received(wire, 900)  # handshake
    meter.sent(wire, 100)  # join
    meter.settle(wire, "a", useful=False)
    meter.received(wire, 50)
    meter.sent(wire, 30)  # poll, held
    meter.received(wire, 5)  # not yet named either
    meter.settle(wire, "a", useful=True)
    meter.received(wire, 8000), meter.received(wire, 400)
    meter.sent(wire, 4000), meter.sent(wire, 300)  # reply in two parts
    meter.settle(wire, "a", useful=True)
    meter.received(wire, 20)
    assert meter.totals() == {"a": Traffic(4330, 8425, 600, 950)}
    assert meter.totals()["a"] - Traffic(4000, 8000, 600, 900) == Traffic(330, 425, 0, 50)


def test_a_connection_that_breaks_is_booked_as_idle_and_reported_when_it_was_the_last():
    """Kills: losing the bytes of a broken request; reporting a client gone that has another connection."""
    left = []
    meter = Meter(left.append)
    for port in (1, 2):
        meter.wires[port] = Wire()
        meter.settle(meter.wires[port], "a", useful=False)
    assert meter.present() == {"a"}
    meter.sent(meter.wires[1], 77)
    meter.closed(1)
    assert left == []
    meter.closed(2)
    assert left == ["a"]
    assert meter.present() == set()
    assert meter.totals() == {"a": Traffic(0, 0, 77, 0)}


def test_the_relay_passes_on_every_byte_and_counts_it():
    """Kills: bytes cut off when one side closes; counting only one direction or only whole chunks."""
    up, down = bytes(range(256)) * 3000, b"answer" * 50_000

    async def inner(reader, writer):
        assert await reader.readexactly(len(up)) == up
        writer.write(down)
        writer.close()

    async def scene():
        meter = Meter(lambda name: None)
        inside, outside = listen("127.0.0.1", 0), listen("127.0.0.1", 0)
        port = outside.getsockname()[1]
        server = await asyncio.start_server(inner, sock=inside)
        relay = await asyncio.start_server(Relay(meter, inside.getsockname()[1]).connect, sock=outside)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(up)
        while not meter.wires:
            await asyncio.sleep(0)
        (wire,) = meter.wires.values()
        meter.settle(wire, "a", useful=True)
        got = await reader.read()
        writer.close()
        relay.close(), server.close()
        while meter.wires:
            await asyncio.sleep(0)
        return got, meter.totals()["a"]

    got, traffic = asyncio.run(asyncio.wait_for(scene(), 10))
    assert got == down
    assert traffic.up_bytes + traffic.idle_up_bytes == len(up)
    assert traffic.down_bytes + traffic.idle_down_bytes == len(down)


def test_a_connection_that_does_not_say_whose_it_is_is_closed():
    """Kills: connections that cost a place for ever; clients cut off while they train."""
    meter, gone = Meter(lambda name: None), []
    stranger, known = Wire(lambda: gone.append("stranger")), Wire(lambda: gone.append("known"))
    meter.add(1, stranger), meter.add(2, known)
    meter.enter(known, "a")
    dismiss(stranger), dismiss(known)
    assert gone == ["stranger"]
