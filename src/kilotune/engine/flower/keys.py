"""Keys of a deployed federation: a private CA, the server's key and certificate, and one join file per client.

The server keeps the public key of every client it enrolled; a client proves its name by the private key and the
certificate in its join file, so a join file is a secret. The same keys sign the messages (seals.py). Nothing is ever
overwritten except by `rotate`: a second call of `init_server` adds what is missing.
"""

import base64
import hashlib
import ipaddress
import json
import os
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from kilotune.core.errors import FederationError
from kilotune.engine.flower.certificates import (
    authority,
    client_certificate,
    load_private,
    new_key,
    private_pem,
    public_pem,
    server_certificate,
)

JOIN_FORMAT = "kilotune-join-2"
FIRST_JOIN_FORMAT = "kilotune-join-1"  # had no certificate and no key of the server
SERVER_FORMAT = "kilotune-server-1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ENROLLED = 10_000  # clients of one federation at most: each is enrolled by hand


@dataclass(frozen=True)
class ServerKeys:
    """What a server needs: its certificate and the clients it knows, name -> public key (PEM)."""

    folder: Path
    federation: str
    host: str
    port: int
    insecure: bool
    clients: dict[str, bytes]

    @property
    def certificate(self) -> Path:
        """The server's certificate, signed by the federation's own CA."""
        return self.folder / "server.crt"

    @property
    def authority(self) -> Path:
        """The CA's certificate, by which clients' certificates are checked."""
        return self.folder / "ca.crt"

    @property
    def key(self) -> Path:
        """The private key of the certificate; it also signs every request."""
        return self.folder / "server.key"

    def signing_key(self) -> ec.EllipticCurvePrivateKey:
        """The key itself. Raises FederationError when the file holds something else."""
        try:
            return load_private(self.key.read_bytes())
        except ValueError as error:
            raise FederationError(f"{self.key}: {error}. Restore it, or make new keys in another folder.") from None

    def join_path(self, name: str) -> Path:
        """Where the join file of a client was written; give it to the client and delete it here."""
        return self.folder / f"{name}.join"


@dataclass(frozen=True)
class JoinFile:
    """What a client needs to take part. `ca` and `certificate` are None only in a federation made insecure on purpose.

    `server_key` (PEM) is the one key the server may have: TLS and signatures are held to it.
    """

    server: str
    federation: str
    client: str
    key: bytes = field(repr=False)
    ca: bytes | None = field(repr=False)
    certificate: bytes | None = field(repr=False)
    server_key: bytes = field(repr=False)


def init_server(folder: Path, host: str, port: int, clients: list[str], *, insecure: bool = False) -> ServerKeys:
    """Make the keys of a federation, or add clients to it. Existing keys and join files stay as they are."""
    for name in clients:
        if not NAME.fullmatch(name):
            raise FederationError(f"client name: got {name!r}, expected letters, digits, '.', '_', '-' (at most 64).")
    if insecure and not is_loopback(host):
        raise FederationError(f"host: got {host!r}, expected a loopback address: without TLS it is for tests only.")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    if (folder / "server.json").exists():
        keys = load_server_keys(folder)
        if (keys.host, keys.port, keys.insecure) != (host, port, insecure):
            made_for = f"{keys.host}:{keys.port}" + (" (insecure)" if keys.insecure else "")
            raise FederationError(f"{folder}: these keys are for {made_for}. Use that address or another folder.")
    else:
        _make_keys(folder, host, insecure)
        keys = ServerKeys(folder, secrets.token_hex(8), host, port, insecure, {})
        _save(keys)
    if len({*keys.clients, *clients}) > ENROLLED:
        raise FederationError(f"{folder}: a federation has {ENROLLED:,} clients at most. Revoke some first.")
    for name in clients:
        if name not in keys.clients:
            keys.clients[name] = _enrol(keys, name)
            _save(keys)
    return keys


def load_server_keys(folder: Path) -> ServerKeys:
    """Read what init_server made."""
    path = folder / "server.json"
    if not path.exists():
        raise FederationError(f"{folder}: no server keys here. Make them with: kilotune server init.")
    try:
        fields = json.loads(path.read_text())
        if fields.pop("format") != SERVER_FORMAT:
            raise ValueError
        fields["clients"] = {str(name): str(key).encode() for name, key in fields["clients"].items()}
        keys = ServerKeys(folder, **fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FederationError(f"{path}: not a file made by kilotune server init.") from None
    for file in (keys.key,) if keys.insecure else (keys.key, keys.certificate, keys.authority):
        if not file.exists():
            raise FederationError(f"{file}: missing. Restore it, or make new keys in another folder.")
    return keys


def revoke(folder: Path, name: str) -> ServerKeys:
    """Forget a client: its join file opens nothing once the server has restarted."""
    keys = _of_enrolled(folder, name)
    del keys.clients[name]
    keys.join_path(name).unlink(missing_ok=True)
    _save(keys)
    return keys


def rotate(folder: Path, name: str) -> ServerKeys:
    """A new key, certificate and join file for a client; the old ones open nothing once the server has restarted."""
    keys = _of_enrolled(folder, name)
    keys.join_path(name).unlink(missing_ok=True)
    keys.clients[name] = _enrol(keys, name)
    _save(keys)
    return keys


def _of_enrolled(folder: Path, name: str) -> ServerKeys:
    keys = load_server_keys(folder)
    if name not in keys.clients:
        raise FederationError(f"client name: got {name!r}, expected one of {', '.join(keys.clients) or 'none'}.")
    return keys


def read_join_file(path: Path) -> JoinFile:
    """Read and check a join file; no part of it is trusted before this has passed."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise FederationError(f"{path}: cannot read the join file ({reason}). Ask the server's owner for it.") from None
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("it is not a kilotune join file")
        if fields.get("format") == FIRST_JOIN_FORMAT:
            raise ValueError("an older kilotune made it (`kilotune server rotate` makes a new one)")
        if fields.get("format") != JOIN_FORMAT:
            raise ValueError("it is not a kilotune join file")
        return _checked(fields)
    except KeyError as error:
        raise FederationError(f"{path}: the field {error} is missing. Ask the server's owner for a new one.") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FederationError(f"{path}: cannot use it: {error}. Ask the server's owner for a new one.") from None


def _checked(fields: dict[str, object]) -> JoinFile:
    """Raises KeyError or ValueError for what cannot be used."""
    names = ["server", "federation", "client", "key", "server_key"]
    insecure = fields.get("insecure") is True
    if not insecure:
        names += ["ca", "certificate"]
    texts = {name: fields[name] for name in names}
    if not all(isinstance(value, str) and value for value in texts.values()):
        raise ValueError("a field is not text")
    found = {name: str(value) for name, value in texts.items()}
    if not NAME.fullmatch(found["client"]):
        raise ValueError(f"the client name {found['client']!r} is none")
    public = public_pem(load_private(found["key"].encode()))
    if not isinstance(load_pem_public_key(found["server_key"].encode()), ec.EllipticCurvePublicKey):
        raise ValueError("the server's key is of another kind")
    ca = certificate = None
    if not insecure:
        ca, certificate = found["ca"].encode(), found["certificate"].encode()
        x509.load_pem_x509_certificate(ca)
        own = x509.load_pem_x509_certificate(certificate).public_key()
        if own.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) != public:
            raise ValueError("its certificate belongs to another key")
    key, server_key = found["key"].encode(), found["server_key"].encode()
    return JoinFile(found["server"], found["federation"], found["client"], key, ca, certificate, server_key)


def _enrol(keys: ServerKeys, name: str) -> bytes:
    private = new_key()
    fields = {
        "format": JOIN_FORMAT,
        "server": address(keys.host, keys.port),
        "federation": keys.federation,
        "client": name,
        "key": private_pem(private).decode(),
        "server_key": public_pem(keys.signing_key()).decode(),
        "insecure": keys.insecure,
    }
    if not keys.insecure:
        certificate = client_certificate(keys.folder, private, name)
        fields |= {"ca": keys.authority.read_text(), "certificate": certificate.decode()}
    _write_secret(keys.join_path(name), json.dumps(fields, indent=1).encode())
    return public_pem(private)


def key_id(public_key: bytes) -> str:
    """12 characters that stand for an enrolled public key (PEM) in every request."""
    return base64.urlsafe_b64encode(hashlib.sha256(public_key).digest()[:9]).decode()


def address(host: str, port: int) -> str:
    """HOST:PORT, with brackets around IPv6 numbers."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a host name or number means this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _save(keys: ServerKeys) -> None:
    fields = {
        "format": SERVER_FORMAT,
        "federation": keys.federation,
        "host": keys.host,
        "port": keys.port,
        "insecure": keys.insecure,
        "clients": {name: key.decode() for name, key in keys.clients.items()},
    }
    partial = keys.folder / "server.json.partial"
    partial.unlink(missing_ok=True)
    _write_secret(partial, json.dumps(fields, indent=1).encode())
    partial.replace(keys.folder / "server.json")


def _make_keys(folder: Path, host: str, insecure: bool) -> None:
    """The server's key, and with TLS the CA and the server's certificate."""
    server = new_key()
    _write_secret(folder / "server.key", private_pem(server))
    if insecure:
        return
    ca = new_key()
    _write_secret(folder / "ca.key", private_pem(ca))
    (folder / "ca.crt").write_bytes(authority(ca))
    (folder / "server.crt").write_bytes(server_certificate(folder, server, host))


def _write_secret(path: Path, content: bytes) -> None:
    """Create a file only its owner can read; refuses to overwrite."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise FederationError(f"{path}: there is one already. Move it away, or use another folder.") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
