"""Keys of a federation and the errors of a join file."""

import json
import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from kilotune.core.errors import FederationError
from kilotune.engine.flower.certificates import owner
from kilotune.engine.flower.keys import init_server, load_server_keys, read_join_file, revoke, rotate


def test_a_second_call_adds_clients_and_overwrites_nothing(tmp_path):
    """Kills: new CA or new client keys on every call, which would lock out everybody."""
    first = init_server(tmp_path, "fed.example.org", 8443, ["a", "b"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "server.json"}
    second = init_server(tmp_path, "fed.example.org", 8443, ["b", "c"])
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.items() <= after.items()
    assert second.federation == first.federation
    assert list(second.clients) == ["a", "b", "c"]
    assert second.clients["a"] == first.clients["a"]
    assert load_server_keys(tmp_path) == second
    joins = [read_join_file(second.join_path(name)) for name in "abc"]
    assert [join.client for join in joins] == ["a", "b", "c"]
    assert {join.server for join in joins} == {"fed.example.org:8443"}
    assert len({join.key for join in joins}) == 3


def test_secrets_are_readable_by_their_owner_only_and_never_shown(tmp_path):
    """Kills: world-readable keys; a private key in a log line."""
    keys = init_server(tmp_path, "127.0.0.1", 8443, ["a"])
    for name in ("ca.key", "server.key", "a.join", "server.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name
    join = read_join_file(keys.join_path("a"))
    assert "PRIVATE" not in repr(join)
    assert "BEGIN" not in str(keys.clients.keys())


@pytest.mark.parametrize("host, kind", [("fed.example.org", x509.DNSName), ("192.0.2.7", x509.IPAddress)])
def test_the_certificate_names_the_host_and_loopback_and_is_signed_by_the_ca(tmp_path, host, kind):
    """Kills: a certificate that clients refuse by name; an IP address written as a DNS name."""
    keys = init_server(tmp_path, host, 8443, ["a"])
    certificate = x509.load_pem_x509_certificate(keys.certificate.read_bytes())
    ca = x509.load_pem_x509_certificate(read_join_file(keys.join_path("a")).ca)
    certificate.verify_directly_issued_by(ca)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert host in map(str, names.get_values_for_type(kind))
    assert "localhost" in names.get_values_for_type(x509.DNSName)
    assert "127.0.0.1" in map(str, names.get_values_for_type(x509.IPAddress))
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_insecure_has_to_be_asked_for_and_is_not_mixed(tmp_path):
    """Kills: falling back to plain HTTP; turning a secure folder insecure."""
    join = read_join_file(init_server(tmp_path / "open", "127.0.0.1", 8000, ["a"], insecure=True).join_path("a"))
    assert join.ca is None
    init_server(tmp_path / "safe", "127.0.0.1", 8000, ["a"])
    with pytest.raises(FederationError, match=r"these keys are for 127.0.0.1:8000\. Use that address"):
        init_server(tmp_path / "safe", "127.0.0.1", 8000, ["a"], insecure=True)


def test_a_revoked_client_is_forgotten_and_gets_a_new_key_when_enrolled_again(tmp_path):
    """Kills: a revoked key that still opens the door."""
    old = init_server(tmp_path, "127.0.0.1", 8443, ["a", "b"])
    assert list(revoke(tmp_path, "a").clients) == ["b"]
    new = init_server(tmp_path, "127.0.0.1", 8443, ["a"])
    assert new.clients["a"] != old.clients["a"]
    with pytest.raises(FederationError, match="got 'z', expected one of"):
        revoke(tmp_path, "z")


def test_a_rotated_client_gets_a_new_key_and_its_name_in_a_new_certificate(tmp_path):
    """Kills: a new certificate for the old key; rotation that enrols somebody new."""
    before = init_server(tmp_path, "127.0.0.1", 8443, ["a", "b"])
    old = read_join_file(before.join_path("a"))
    after = rotate(tmp_path, "a")
    new = read_join_file(after.join_path("a"))
    assert owner(der(new.certificate)) == ("a", after.clients["a"])
    assert owner(der(old.certificate)) == ("a", before.clients["a"])
    assert after.clients["a"] != before.clients["a"]
    assert after.clients["b"] == before.clients["b"]
    assert (new.ca, new.server_key, new.federation) == (old.ca, old.server_key, old.federation)
    x509.load_pem_x509_certificate(new.certificate).verify_directly_issued_by(x509.load_pem_x509_certificate(new.ca))
    with pytest.raises(FederationError, match="got 'z', expected one of"):
        rotate(tmp_path, "z")
    (tmp_path / "ca.key").unlink()
    with pytest.raises(FederationError, match=r"ca\.key: missing, so nothing can be certified"):
        rotate(tmp_path, "b")


def der(pem):
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)


def test_without_tls_a_federation_stays_on_its_machine(tmp_path):
    """Kills: plain text over a real network by one careless flag."""
    with pytest.raises(FederationError, match="expected a loopback address"):
        init_server(tmp_path, "192.0.2.7", 8443, ["a"], insecure=True)


@pytest.mark.parametrize("name", ["", "../up", "a b", ".hidden", "x" * 65, "a/b"])
def test_a_client_name_that_is_no_file_name_is_refused(tmp_path, name):
    """Kills: writing a join file outside the folder."""
    with pytest.raises(FederationError, match="client name"):
        init_server(tmp_path, "127.0.0.1", 8443, [name])


def test_an_existing_join_file_of_unknown_origin_is_not_overwritten(tmp_path):
    """Kills: destroying a file that may be the only copy of a key."""
    (tmp_path / "a.join").write_text("mine")
    with pytest.raises(FederationError, match=r"a\.join: there is one already"):
        init_server(tmp_path, "127.0.0.1", 8443, ["a"])
    assert (tmp_path / "a.join").read_text() == "mine"


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda f: None, "cannot read the join file"),
        (lambda f: "{", "cannot use it"),
        (lambda f: "[]", "not a kilotune join file"),
        (lambda f: json.dumps(f | {"format": "other"}), "not a kilotune join file"),
        (lambda f: json.dumps({k: v for k, v in f.items() if k != "server"}), "'server' is missing"),
        (lambda f: json.dumps({k: v for k, v in f.items() if k != "ca"}), "'ca' is missing"),
        (lambda f: json.dumps({k: v for k, v in f.items() if k != "server_key"}), "'server_key' is missing"),
        (lambda f: json.dumps(f | {"format": "kilotune-join-1"}), "an older kilotune made it"),
        (lambda f: json.dumps(f | {"certificate": f["ca"]}), "its certificate belongs to another key"),
        (lambda f: json.dumps(f | {"client": "../up"}), "the client name '../up' is none"),
        (lambda f: json.dumps(f | {"client": 3}), "a field is not text"),
        (lambda f: json.dumps(f | {"key": "junk"}), "cannot use it"),
        (lambda f: json.dumps(f | {"ca": "junk"}), "cannot use it"),
        (lambda f: json.dumps(f | {"ca": ""}), "cannot use it"),
        (lambda f: json.dumps(f | {"server_key": f["ca"]}), "cannot use it"),
    ],
)
def test_a_bad_join_file_is_refused_with_its_path(tmp_path, change, complaint):
    """Kills: tracebacks from json or cryptography; a missing CA taken for an insecure federation."""
    path = init_server(tmp_path, "127.0.0.1", 8443, ["a"]).join_path("a")
    text = change(json.loads(path.read_text()))
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(FederationError, match=complaint) as caught:
        read_join_file(path)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).count("\n") == 0


def test_server_keys_that_are_missing_or_cut_are_named(tmp_path):
    """Kills: starting without a certificate."""
    with pytest.raises(FederationError, match="no server keys here"):
        load_server_keys(tmp_path)
    keys = init_server(tmp_path, "127.0.0.1", 8443, ["a"])
    keys.certificate.unlink()
    with pytest.raises(FederationError, match=r"server\.crt: missing"):
        load_server_keys(tmp_path)
    (tmp_path / "server.json").write_text("{}")
    with pytest.raises(FederationError, match="not a file made by"):
        load_server_keys(tmp_path)
