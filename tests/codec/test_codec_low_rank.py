"""Low rank: golden bytes, ranks below and above the receiver's own, and ranks that no payload can have."""

import struct

import pytest
import torch

from kilotune.codec import TensorUpdate, WireContext, WireError
from kilotune.codec.low_rank import LowRank

SHAPES = {"x.lora_A.w": (3, 2), "x.lora_B.w": (1, 3)}
CONTEXT = WireContext(1, 5, SHAPES)


def pair(rank: int) -> TensorUpdate:
    a = torch.arange(1.0, 2 * rank + 1).reshape(rank, 2)
    return TensorUpdate({"x.lora_A.w": a, "x.lora_B.w": torch.full((1, rank), 0.5)})


def test_the_payload_is_the_one_that_the_wire_page_shows():
    """Kills: a rank of another width or byte order; a header after the numbers."""
    one = TensorUpdate({"x.lora_A.w": torch.tensor([[1.0, -2.0]]), "x.lora_B.w": torch.tensor([[0.5]])})
    payload = LowRank().encode(one, CONTEXT, {})
    assert payload.hex() == "4c57523101000000" + "444e533101" + "33abb7b6" + "0300000000000000" + "003c00c00038"
    assert len(payload) == LowRank().predict_bytes({"x.lora_A.w": 2, "x.lora_B.w": 1}, 0)


def test_pairs_of_fewer_components_are_filled_up_and_those_of_more_are_kept():
    """Kills: a rank taken from the receiver; zeros in front; components cut off."""
    few = LowRank().decode(LowRank().encode(pair(2), CONTEXT, {}), CONTEXT).tensors
    assert few["x.lora_A.w"].tolist() == [[1, 2], [3, 4], [0, 0]]
    assert few["x.lora_B.w"].tolist() == [[0.5, 0.5, 0]]
    many = LowRank().decode(LowRank().encode(pair(4), CONTEXT, {}), CONTEXT).tensors
    assert all(torch.equal(value, pair(4).tensors[name]) for name, value in many.items())


@pytest.mark.parametrize("rank", [0, 1, 3, 2**32 - 1])
def test_a_rank_that_is_not_the_payloads_is_refused(rank):
    """Kills: memory taken for what a header promises."""
    payload = bytearray(LowRank().encode(pair(2), CONTEXT, {}))
    payload[4:8] = struct.pack("<I", rank)
    with pytest.raises(WireError, match="low_rank"):
        LowRank().decode(bytes(payload), CONTEXT)


def test_pairs_of_different_ranks_are_not_sent():
    mixed = TensorUpdate({**pair(2).tensors, "x.lora_B.w": torch.ones(1, 3)})
    with pytest.raises(ValueError, match=r"ranks \[2, 3\]"):
        LowRank().encode(mixed, CONTEXT, {})
