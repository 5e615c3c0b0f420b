"""Checks of the secrets of a federation on this disk: who can read them, what they are, until when they hold."""

import os
import socket
import ssl
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from kilotune.core.errors import FederationError
from kilotune.engine.flower.certificates import public_pem
from kilotune.engine.flower.keys import ServerKeys, address, load_server_keys
from kilotune.engine.flower.traffic import listen
from kilotune.engine.operations.checks import Check, judged

EXPIRES_SOON = timedelta(days=30)
PROBE_S = 5.0


def key_checks(folder: Path, now: datetime) -> Iterator[Check]:
    """Everything about a server's key folder, and whether the server could listen."""
    try:
        keys = load_server_keys(folder)
        own = None if keys.insecure else public_pem(keys.signing_key())
    except (FederationError, OSError) as error:
        yield Check("keys", False, str(error), "Restore the folder from its backup, or run kilotune server init.")
        return
    count = f"{len(keys.clients)} client{'' if len(keys.clients) == 1 else 's'} enrolled"
    fix = "Enrol some: kilotune server init FOLDER --client NAME."
    yield judged("keys", bool(keys.clients), f"federation {keys.federation}, {count}", fix)
    yield permission_check("key folder", folder, 0o700)
    secrets = sorted({*folder.glob("*.key"), *folder.glob("*.join"), *folder.glob("*.token"), folder / "server.json"})
    yield from (permission_check(path.name, path, 0o600) for path in secrets if path.exists())
    if keys.insecure:
        yield Check("certificate", False, "made without TLS", "Make new keys without --insecure in another folder.")
    else:
        yield from _certificate_checks(keys, own, now)
    yield port_check(keys)


def permission_check(name: str, path: Path, wanted: int) -> Check:
    """Nobody but its owner may read a secret."""
    if os.name != "posix":
        return Check(name, True, "permissions are not looked at on this system")
    mode = path.stat().st_mode & 0o777
    found = f"{path}: {mode:04o}"
    if not os.access(path, os.R_OK):
        return Check(name, False, f"{path}: cannot be read by this user", f"chown {path} to the user that runs this.")
    return judged(name, mode & ~wanted == 0, found, f"chmod {wanted:o} {path}, and ask who could read it.")


def dates_check(name: str, certificate: x509.Certificate, now: datetime, fix: str) -> Check:
    """Valid now and for another 30 days."""
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    found = f"valid from {start:%Y-%m-%d} to {end:%Y-%m-%d}"
    if now < start:
        return Check(name, False, f"{found}: not yet", f"Set this machine's clock; it says {now:%Y-%m-%d %H:%M}.")
    if now > end:
        return Check(name, False, f"{found}: expired", fix)
    return judged(name, end - now > EXPIRES_SOON, found, fix)


def _certificate_checks(keys: ServerKeys, own: bytes | None, now: datetime) -> Iterator[Check]:
    renew = "Make new keys in another folder and enrol the clients again: see docs/runbook.md, Rotate keys."
    try:
        ca = x509.load_pem_x509_certificate(keys.authority.read_bytes())
        server = x509.load_pem_x509_certificate(keys.certificate.read_bytes())
    except ValueError as error:
        yield Check("certificate", False, f"{keys.folder}: no certificate: {error}", "Restore it from the backup.")
        return
    yield dates_check("CA certificate", ca, now, renew)
    yield dates_check("server certificate", server, now, renew)
    try:
        server.verify_directly_issued_by(ca)
        signed = True
    except (ValueError, TypeError, InvalidSignature):
        signed = False
    fix = "Files of two federations are mixed here: restore the folder from its backup."
    found = "signed by the federation's CA" if signed else "not signed by the CA in this folder"
    yield judged("chain", signed, found, fix)
    fits = server.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) == own
    found = "belongs to server.key" if fits else "server.key belongs to another certificate"
    yield judged("key pair", fits, found, fix)


def port_check(keys: ServerKeys) -> Check:
    """Free, or taken by this federation's own server."""
    where = address(keys.host, keys.port)
    try:
        listen(keys.host, keys.port).close()
        return Check("port", True, f"{where} is free")
    except OSError as error:
        reason = error.strerror or str(error)
    if not keys.insecure and _is_ours(keys):
        return Check("port", True, f"{where}: this federation's server is running")
    fix = "Stop what listens there, or make keys for another --port; --host must be an address of this machine."
    return Check("port", False, f"{where}: {reason}", fix)


def _is_ours(keys: ServerKeys) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(keys.authority)
    try:
        with (
            socket.create_connection((keys.host, keys.port), PROBE_S) as plain,
            context.wrap_socket(plain, server_hostname=keys.host),
        ):
            return True
    except OSError:
        return False
