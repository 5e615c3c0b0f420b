"""server init, revoke, rotate: what the owner of a federation does by hand."""

from pathlib import Path

from command_line import kilotune


def test_an_owner_enrols_rotates_and_revokes_by_hand(tmp_path):
    """Kills: commands that do another's work; a rotation that leaves the old file in place."""
    keys = tmp_path / "keys"
    made = kilotune("server", "init", keys, "--client", "ada", "--client", "bob", "--format", "json").json
    before = {name: Path(path).read_bytes() for name, path in made["join_files"].items()}
    assert sorted(before) == ["ada", "bob"]
    turned = kilotune("server", "rotate", keys, "ada", "--format", "json").json
    assert turned == {"rotated": "ada", "join_file": made["join_files"]["ada"]}
    assert Path(turned["join_file"]).read_bytes() != before["ada"]
    assert Path(made["join_files"]["bob"]).read_bytes() == before["bob"]
    left = kilotune("server", "revoke", keys, "bob", "--format", "json").json
    assert left == {"revoked": "bob", "clients": ["ada"]}
    refused = kilotune("server", "rotate", keys, "bob")
    assert refused.code == 1
    assert "got 'bob', expected one of ada" in refused.err
