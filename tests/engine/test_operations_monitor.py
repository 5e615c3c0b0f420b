"""The site behind a socket: plain on loopback, TLS with the federation's certificate elsewhere, one token for both."""

import json
import os
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from federating import plan
from kilotune.core.errors import FederationError, RecipeError
from kilotune.engine.flower.keys import init_server
from kilotune.engine.operations.monitor import Listener, measure, monitored, parse_address, read_token, running
from kilotune.engine.operations.runview import RunView
from kilotune.engine.operations.site import Site

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return init_server(tmp_path_factory.mktemp("federation") / "keys", "127.0.0.1", 8443, ["ada", "bob"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:9464", ("0.0.0.0", 9464)),
        ("[::]:9464", ("::", 9464)),
        ("wards.example:80", ("wards.example", 80)),
    ],
)
def test_without_a_host_only_this_machine_can_ask(text, expected):
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["", "x", ":9464", "host:", "1:99999", "1:-1", "1:9x"])
def test_an_address_that_is_none_is_told_with_an_example(text):
    with pytest.raises(RecipeError, match="expected PORT or HOST:PORT"):
        parse_address(text)


def test_the_token_is_made_once_and_is_its_owners_alone(tmp_path):
    """Kills: a token that changes under a scraper; one that others on this machine can read; an empty one."""
    token = read_token(tmp_path)
    assert read_token(tmp_path) == token
    assert len(token) >= 40
    assert (tmp_path / "dashboard.token").stat().st_mode & 0o777 == 0o600
    (tmp_path / "dashboard.token").write_text("short")
    with pytest.raises(FederationError, match="at least 32 characters"):
        read_token(tmp_path)


def test_on_loopback_a_run_is_seen_while_it_lasts(keys, base, data, tmp_path):
    """Kills: events that reach the display but not the page; a site that outlives its run; a token in the log."""
    events = []
    recipe = plan(base, data, "kilotune")
    with monitored("0", recipe, keys.folder, tmp_path / "run", events.append) as emit:
        url = events[0]["text"].split()[3].rstrip(",")
        emit({"event": "status", "text": "ada joined"})
        emit({"event": "round", "round": 1, "clients": 2, "up_bytes": 10, "head": "ab"})
        state = httpx.get(url + "state", trust_env=False).json()
        assert (state["round"], state["planned"], state["totals"]["up_bytes"]) == (1, 2, 10)
        assert {name: c["status"] for name, c in state["clients"].items()} == {"ada": "joined", "bob": "away"}
        assert state["facts"]["recipe"] == recipe.id
        assert httpx.get(url + "health", trust_env=False).status_code == 200
        assert httpx.post(url + "stop", trust_env=False).status_code == 401
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)
    assert [event["event"] for event in events] == ["page", "status", "round"]
    assert read_token(keys.folder) not in json.dumps(events)


def test_an_event_the_page_cannot_read_does_not_end_the_run(keys, base, data, tmp_path):
    """Kills: a federation of days that ends because of its own display."""
    events = []
    with monitored("0", plan(base, data), keys.folder, tmp_path / "run", events.append) as emit:
        emit({"event": "round", "round": "three"})
        emit({"event": "end", "digest": "cafe"})
    assert [event["event"] for event in events] == ["page", "round", "page", "end"]
    assert "misses an event 'round'" in events[2]["text"]


def test_without_a_dashboard_nothing_listens_and_nothing_is_written(base, data, tmp_path):
    emitted = []
    with monitored(None, plan(base, data), tmp_path / "keys", tmp_path / "run", emitted.append) as emit:
        assert emit == emitted.append
    assert list(tmp_path.iterdir()) == []


def test_elsewhere_it_speaks_tls_1_3_with_the_federations_certificate(keys):
    """Kills: a token that crosses a network in the open; a certificate nobody can check."""
    view = RunView({}, 4)
    where = {"disk_free_bytes": 1e12}
    site = Site(view, read_token(keys.folder), lambda: None, lambda: where, open_reads=False)
    trust = ssl.create_default_context(cafile=str(keys.authority))
    header = {"Authorization": f"Bearer {read_token(keys.folder)}"}
    with running(site, Listener("127.0.0.1", 0, keys)) as url:
        assert url.startswith("https://")
        with httpx.Client(verify=trust, trust_env=False) as client:
            assert client.get(url + "metrics").status_code == 401
            answer = client.get(url + "metrics", headers=header)
            assert answer.status_code == 200
            assert answer.text.startswith("# HELP kilotune_")
        old = ssl.create_default_context(cafile=str(keys.authority))
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with httpx.Client(verify=old, trust_env=False) as client, pytest.raises(httpx.ConnectError):
            client.get(url)


def test_the_containers_health_check_says_what_health_says(keys):
    """Kills: a check that is happy without a server, without a token or with 503."""
    free = {"disk_free_bytes": 1e12}
    site = Site(RunView({}, 4), read_token(keys.folder), lambda: None, lambda: free, open_reads=False)

    def checked(port):
        command = [sys.executable, str(DEPLOY / "healthcheck.py"), str(keys.folder), str(port)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    listener = Listener("127.0.0.1", 0, keys)
    port = listener.socket.getsockname()[1]
    with running(site, listener):
        well = checked(port)
        free["disk_free_bytes"] = 0
        full = checked(port)
    assert (well.returncode, json.loads(well.stdout)["status"]) == (0, "ok")
    assert (full.returncode, checked(port).returncode) == (1, 1)
    assert "503" in full.stderr


def test_keys_without_tls_allow_a_page_on_this_machine_only(base, data, tmp_path):
    """Kills: a token in plain text on a network, in a federation made insecure for a test."""
    insecure = init_server(tmp_path / "keys", "127.0.0.1", 8443, ["ada"], insecure=True)
    with (
        pytest.raises(FederationError, match="on this machine only"),
        monitored("0.0.0.0:0", plan(base, data), insecure.folder, tmp_path, lambda event: None),
    ):
        pass


def test_a_port_that_is_taken_is_told(keys, base, data, tmp_path):
    with Listener("127.0.0.1", 0, None).socket as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(FederationError, match="--dashboard: cannot listen on"),
            monitored(str(port), plan(base, data), keys.folder, tmp_path, lambda event: None),
        ):
            pass


def test_a_failure_is_on_the_page_and_a_stop_is_none(keys, base, data, tmp_path, monkeypatch):
    """Kills: health that is fine while the server dies of an error; an alarm for a stop that was asked for."""
    seen = []
    monkeypatch.setattr(RunView, "fold", lambda self, event: seen.append(event))
    with pytest.raises(FederationError), monitored("0", plan(base, data), keys.folder, tmp_path, seen.append):
        raise FederationError("round 2: 1 of 3 clients answered")
    assert seen[-1] == {"event": "failed", "why": "round 2: 1 of 3 clients answered"}


def test_free_disk_is_that_of_the_place_where_the_run_folder_will_be(tmp_path):
    found = measure(tmp_path / "not" / "yet" / "there")
    there = os.statvfs(tmp_path)
    assert found["disk_free_bytes"] == pytest.approx(there.f_bavail * there.f_frsize, rel=0.05)
    assert found["peak_rss_bytes"] > 1e6
