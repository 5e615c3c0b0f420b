"""The live page in a real browser, and a real server that is stopped twice, asked meanwhile, and ends as ever."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from engine.test_deployed import CLIENTS, PATIENCE_S, SETTINGS, Deployment
from federating import plan, quiet
from kilotune.core.units import human_bytes
from kilotune.engine.operations.monitor import Listener, measure, running
from kilotune.engine.operations.reach import join_checks
from kilotune.engine.operations.runview import RunView
from kilotune.engine.operations.site import Site
from kilotune.engine.session import federate
from ports import free_port

pytestmark = pytest.mark.processes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
TOKEN = "a-token-of-the-live-page-for-this-test-only"


# -- in a browser -----------------------------------------------------------------------------------------------------


def chromium(folder: Path, url: str, *options: str) -> str:
    """What Chromium says on stdout, without a window, a sandbox or anything from outside."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--hide-scrollbars", "--virtual-time-budget=5000", "--window-size=1280,1500", *options, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def text_of(dom: str, name: str) -> str:
    """The text of the element with this id."""
    (inside,) = re.findall(rf'<(\w+)[^>]*\bid="{name}"[^>]*>(.*?)</\1>', dom, re.DOTALL)
    return re.sub(r"<[^>]+>", " ", inside[1]).strip()


class Growing(Site):
    """After the first state a page reads, one more round is over: only a page that follows the events knows of it."""

    looked = 0

    def _state(self) -> bytes:
        state = super()._state()
        self.looked += 1
        if self.looked == 1:
            counts = {
                "clients": 3,
                "asked": 3,
                "up_bytes": 900,
                "down_bytes": 1800,
                "loss": 3.25,
                "head": "c0ffee" * 10,
            }
            self._view.fold({"event": "round", "round": 4, "seconds": 2.0, "epsilon": 1.75, **counts})
        return state


@pytest.fixture(scope="module")
def view(base, data, tmp_path_factory):
    """Of a real federation of three rounds, with a refusal and a privacy budget."""
    recipe = plan(base, data, "kilotune", "rounds=3", "evaluation.every=1")
    facts = {"title": "Three wards", "recipe": recipe.id, "base": "tiny"}
    seen = RunView(facts, 8, ("ada", "bob", "cyd", "<b>eve</b>"), {"budget": 8.0, "delta": 1e-5})
    federate(recipe, tmp_path_factory.mktemp("page") / "run", lambda e: e["event"] == "finishing" or seen.fold(e))
    why = "sends numbers that are not finite <script>alert(1)</script>"
    seen.fold({"event": "client", "client": "<b>eve</b>", "round": 3, "status": "error", "why": why})
    return seen


@browser
def test_live_numbers_are_on_the_page(view, tmp_path):
    """Kills: a script its own policy forbids; a page that reads once; text of a client that becomes markup."""
    site = Growing(view, TOKEN, lambda: None, lambda: measure(tmp_path), open_reads=True)
    with running(site, Listener("127.0.0.1", 0, None)) as url:
        dom = chromium(tmp_path, f"{url}#token={TOKEN}", "--dump-dom")
        chromium(tmp_path, url, f"--screenshot={tmp_path / 'dashboard.png'}")
    state = view.snapshot()
    assert text_of(dom, "title") == "Three wards"
    assert text_of(dom, "phase") == "running"
    assert text_of(dom, "link") == "live"
    assert text_of(dom, "round") == "4"
    assert text_of(dom, "counted") == "4 of 8 rounds"
    assert text_of(dom, "loss") == f"{state['quality'][-1]['loss']:.3f}"
    assert f"{state['quality'][0]['loss']:.3f} at round 0" in text_of(dom, "loss-more")
    assert text_of(dom, "present") == "4 of 4"
    assert text_of(dom, "bytes") == f"{human_bytes(state['totals']['up_bytes'])} up"
    assert text_of(dom, "bytes-more").startswith(f"{human_bytes(state['totals']['down_bytes'])} down")
    assert (text_of(dom, "epsilon"), text_of(dom, "epsilon-more")) == ("ε = 1.750", "budget 8, δ = 1e-5")
    assert (text_of(dom, "refused"), text_of(dom, "refused-more")) == ("1", "values 1")
    for name, client in state["clients"].items():
        escaped = name.replace("<", "&lt;").replace(">", "&gt;")
        (row,) = re.findall(rf'<tr><th scope="row">{escaped}</th>(.*?)</tr>', dom.split('id="clients"')[1])
        cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
        assert cells[2:5] == [str(client["rounds"]), str(client["examples"] or "–"), human_bytes(client["up_bytes"])]
    assert "<script>alert" not in dom
    assert "sends numbers that are not finite &lt;script&gt;alert(1)&lt;/script&gt;" in dom
    assert "c0ffee" * 10 in text_of(dom, "facts")
    assert dom.count("<polyline") == 3  # held out, training, privacy
    assert 'id="stop" disabled' not in dom
    assert TOKEN not in dom
    keep(tmp_path / "dashboard.png")


def keep(picture: Path) -> None:
    """The screenshot is a picture of the size asked for; KILOTUNE_ARTEFACTS names a folder that gets a copy."""
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(content[16:20]), int.from_bytes(content[20:24])) == (1280, 1500)
    assert len(content) > 30_000  # an empty page has a tenth
    if folder := os.environ.get("KILOTUNE_ARTEFACTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, folder)


@browser
def test_without_the_token_the_page_shows_a_lock_and_no_number(view, tmp_path):
    """Kills: data in the page itself; a page that stays blank without a word."""
    site = Site(view, TOKEN, lambda: None, lambda: measure(tmp_path), open_reads=False)
    with running(site, Listener("127.0.0.1", 0, None)) as url:
        dom = chromium(tmp_path, url, "--dump-dom")
        wrong = chromium(tmp_path, f"{url}#token=guess", "--dump-dom")
        right = chromium(tmp_path, f"{url}#token={TOKEN}", "--dump-dom")
    for page, said in ((dom, "token needed"), (wrong, "wrong token")):
        assert (text_of(page, "phase"), text_of(page, "link"), text_of(page, "round")) == ("locked", said, "–")
        assert 'id="enter" hidden' not in page
        assert "ada" not in page
    assert 'id="enter" hidden' in right
    assert text_of(right, "round") == str(view.snapshot()["round"])


# -- a real server ----------------------------------------------------------------------------------------------------


class Observed(Deployment):
    """A deployment whose server has a live page and logs JSON."""

    def __init__(self, folder: Path, base: Path, data: Path) -> None:
        self.port = free_port()
        super().__init__(folder, base, data)
        self.settings[self.settings.index("rounds=6")] = "rounds=8"

    def _run(self, *words: str) -> subprocess.Popen:
        name = words[0]
        if words[:2] == ("server", "run"):
            words, name = (*words, "--dashboard", str(self.port), "--log-format", "json"), "lead"
        with open(self.folder / f"{name}.log", "ab") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "kilotune", *words]
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def page(self, path: str, method: str = "GET", **options) -> httpx.Response:
        return httpx.request(method, f"http://127.0.0.1:{self.port}{path}", trust_env=False, timeout=30, **options)

    def ended(self, name: str) -> int:
        """The exit code of a process that was asked to stop; then it is started again."""
        code = self.processes[name].wait(timeout=PATIENCE_S)
        self.start(name)
        return code


def test_a_server_and_a_client_that_are_stopped_go_on_to_the_same_digest(base, data, tmp_path):
    """Kills: a stop that loses a round, breaks the ledger or ends with an error; a page of another run; a log line that
    is no JSON; a doctor that cannot talk to a real server."""
    deployment, codes, waiting = Observed(tmp_path, base, data), {}, ["term", "client", "page"]
    header = {"Authorization": "Bearer "}

    def watch(event: dict) -> None:
        number = event.get("round", 0) if event["event"] == "round" else 0
        if number >= 1 and waiting[:1] == ["term"]:
            waiting.pop(0)
            found = {c.check: c.ok for c in join_checks(tmp_path / "keys" / "ada.join", datetime.now(UTC))}
            assert found == dict.fromkeys(found, True)
            assert {"server", "enrolment", "clock", "server's versions"} <= set(found)
            health = deployment.page("/health").json()
            assert (health["status"], health["round"] >= 1, health["planned"]) == ("ok", True, 8)
            deployment.processes["server"].send_signal(signal.SIGTERM)
            codes["term"] = deployment.ended("server")
        elif number >= 3 and waiting[:1] == ["client"]:
            waiting.pop(0)
            deployment.processes["bob"].send_signal(signal.SIGTERM)
            codes["client"] = deployment.ended("bob")
        elif number >= 4 and waiting[:1] == ["page"]:
            waiting.pop(0)
            done = re.search(r"^kilotune_rounds_total (\d+)$", deployment.page("/metrics").text, re.MULTILINE)
            assert int(done[1]) >= 4  # rounds of the process before are among them
            assert deployment.page("/stop", "POST").status_code == 401
            header["Authorization"] += (tmp_path / "keys" / "dashboard.token").read_text()
            assert deployment.page("/stop", "POST", headers=header).status_code == 202
            codes["page"] = deployment.ended("server")

    try:
        for name in ("server", *CLIENTS):
            deployment.start(name)
        for event in deployment.events():
            watch(event)
        assert deployment.processes["server"].wait(timeout=60) == 0, (tmp_path / "lead.log").read_text()[-3000:]
        for name in CLIENTS:
            assert deployment.processes[name].wait(timeout=60) == 0, (tmp_path / "client.log").read_text()[-3000:]
    finally:
        deployment.stop()
    assert codes == {"term": 0, "client": 0, "page": 0}
    summary = json.loads((tmp_path / "server" / "summary.json").read_text())
    settings = [s if s != "rounds=6" else "rounds=8" for s in SETTINGS]
    undisturbed = federate(plan(base, data, "kilotune", *settings), tmp_path / "one", quiet)
    assert summary["digest"] == undisturbed["digest"]
    assert summary["ledger_head"] == undisturbed["ledger_head"]
    assert summary["client_digests"] == dict.fromkeys(CLIENTS, summary["digest"])
    lines = [json.loads(line) for line in (tmp_path / "lead.log").read_text().splitlines()]
    assert all({"time", "level", "event"} <= set(line) for line in lines)
    told = [line for line in lines if line["event"] in ("stopping", "stopped", "end")]
    assert [line["event"] for line in told] == ["stopping", "stopped"] * 2 + ["end"]
    assert [line["why"] for line in told if line["event"] == "stopping"] == ["SIGTERM", "SIGTERM"]
