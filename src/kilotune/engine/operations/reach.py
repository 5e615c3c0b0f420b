"""Checks of a client's way to its server: name, port, TLS, enrolment, clock, versions."""

import http.client
import socket
import ssl
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from cryptography import x509

from kilotune.core.errors import FederationError
from kilotune.core.lines import clean
from kilotune.engine.flower.keys import JoinFile, read_join_file
from kilotune.engine.operations.checks import Check, judged
from kilotune.engine.operations.keychecks import dates_check, permission_check
from kilotune.engine.versions import PACKAGES, versions

TIMEOUT_S = 10.0
SKEW_S = 60.0  # signatures are refused from 300 s on
NEW_ONE = "Ask the server's owner for a new join file (kilotune server rotate)."


def join_checks(path: Path, now: datetime) -> Iterator[Check]:
    """The join file, and what a connection with it finds."""
    try:
        join = read_join_file(path)
    except FederationError as error:
        yield Check("join file", False, str(error), "Put the file back, or ask the server's owner for a new one.")
        return
    yield Check("join file", True, f"client {join.client} of {join.server}")
    yield permission_check("join file's permissions", path, 0o600)
    for name, pem in (("CA certificate", join.ca), ("client certificate", join.certificate)):
        if pem is not None:
            yield dates_check(name, x509.load_pem_x509_certificate(pem), now, NEW_ONE)
    yield from server_checks(join)


def server_checks(join: JoinFile) -> Iterator[Check]:
    """Whether the server answers, to this client, at the same time of day, with the same version."""
    from kilotune.engine.flower.about import ask

    try:
        about = ask(join, TIMEOUT_S)
    except (OSError, http.client.HTTPException, ValueError) as error:
        yield _unreached(join, error)
        return
    yield Check("server", True, f"{join.server} answers; TLS, name and key are in order")
    found = f"{join.client} is enrolled" if about.facts else f"answered with HTTP status {about.status}"
    yield judged("enrolment", about.facts is not None, found, f"The key may be revoked or rotated. {NEW_ONE}")
    if about.facts is None:
        return
    skew = float(about.facts.get("time", 0.0)) - about.clock
    found = f"the server's is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
    fix = "Set the clocks of both machines by NTP; from 300 s on the server refuses this client."
    yield judged("clock", abs(skew) <= SKEW_S, found, fix)
    ours, names = versions(), ("kilotune", "python", *PACKAGES)
    theirs = {name: clean(about.facts.get(name, "none"), 40) for name in names}
    unequal = [name for name in names if theirs[name] != ours.get(name, "none")]
    other = [f"{name} {theirs[name]} (here {ours.get(name, 'none')})" for name in unequal]
    found = f"kilotune {theirs['kilotune']}" + (f"; differing: {', '.join(other)}" if other else ", all versions equal")
    fix = f"Install kilotune {theirs['kilotune']} here, or bring the server to {ours['kilotune']}."
    yield judged("server's versions", theirs["kilotune"] == ours["kilotune"], found, fix)


def _unreached(join: JoinFile, error: Exception) -> Check:
    """Why there was no answer, told apart by what has to be done."""
    said = clean(getattr(error, "verify_message", "") or getattr(error, "strerror", "") or error, 160)
    if isinstance(error, socket.gaierror):
        fix = "Check the address with the server's owner, and this machine's DNS."
        return Check("server", False, f"the name in {join.server} is unknown: {said}", fix)
    if isinstance(error, ssl.SSLCertVerificationError):
        fix = f"Check both clocks and the address; something else may answer there. {NEW_ONE}"
        return Check("server", False, f"{join.server} shows a certificate that does not hold: {said}", fix)
    if isinstance(error, ssl.SSLError):
        return Check("server", False, f"{join.server} broke off the TLS handshake: {said}", NEW_ONE)
    fix = "Start the server; open its port in the firewalls between here and there (TCP, one port)."
    return Check("server", False, f"{join.server} cannot be reached: {said}", fix)
