"""The files in deploy/: what systemd says of the units, and that every command in them is one of ours."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from cli.command_line import kilotune

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")


def words_of_units():
    for unit in UNITS:
        for line in re.findall(r"^ExecStart(?:Pre)?=-?\S+/kilotune (.*)$", unit.read_text(), re.MULTILINE):
            yield pytest.param(line.split(), id=f"{unit.stem} {line.split()[0]}")


def words_of_services():
    for name, service in yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].items():
        yield pytest.param(service["command"], id=f"compose {name}")


@pytest.mark.parametrize("words", [*words_of_units(), *words_of_services()])
def test_every_command_and_option_exists(words):
    """Kills: an example that was right a version ago."""
    command = words[:2] if words[0] == "server" else words[:1]
    ended = kilotune(*command, "--help")
    assert ended.code == 0
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"{option}\b", ended.out), option


@systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_systemd_takes_the_unit_and_finds_it_closed(unit, tmp_path):
    """Kills: a misspelt setting, which systemd ignores; a service that may do what it need not. 10 is wide open."""
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/opt/kilotune/bin/kilotune", "/bin/true"))
    checked = subprocess.run(["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", copy]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_containers_run_without_rights_they_do_not_need():
    """Kills: root in the container; a file system that can be written; a live page open to the network."""
    content = (DEPLOY / "Containerfile").read_text()
    assert re.findall(r"^USER (.*)$", content, re.MULTILINE)[-1] == "10001"
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    assert services["client"].get("ports") is None
    assert "127.0.0.1:9464:9464" in services["server"]["ports"]
