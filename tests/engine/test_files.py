"""Files are replaced whole; tensors go to disk without a second copy in memory."""

import tracemalloc

import pytest
import torch

from kilotune.engine.files import read_tensors, write_tensors


def test_tensors_come_back_bit_for_bit_with_their_facts(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.tensor(7), "c": torch.zeros(0)}
    write_tensors(tmp_path / "x.safetensors", tensors, {"step": "3"})
    found, facts = read_tensors(tmp_path / "x.safetensors")
    assert facts == {"step": "3"}
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_writing_tensors_makes_no_copy_of_them_in_python(tmp_path):
    """Kills: a file made in memory first (the weights and moments of a checkpoint are the peak of a run then)."""
    tensors = {"a": torch.zeros(1 << 20)}
    tracemalloc.start()
    write_tensors(tmp_path / "x.safetensors", tensors, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (1 << 20)


def test_a_disk_that_fills_up_under_tensors_is_one_clear_line(tmp_path, monkeypatch):
    """Kills: the library's own exception reaching the user; a part of a file left behind."""
    import safetensors.torch
    from safetensors import SafetensorError

    from kilotune.core.errors import RunError

    def full(tensors, path, metadata):
        path.write_bytes(b"cut")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(RunError, match=r"the disk is full\. Free some space"):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(3)}, {})
    assert list(tmp_path.iterdir()) == []
