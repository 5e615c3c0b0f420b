"""Keys of a deployed federation: a private CA, the server's certificate, and one join file per client.

The server keeps the public key of every client it enrolled; a client proves its name by signing with the private key
in its join file, so a join file is a secret. Nothing is ever overwritten: a second call adds what is missing.
"""

import base64
import datetime
import hashlib
import ipaddress
import json
import os
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kilotune.core.errors import FederationError

JOIN_FORMAT = "kilotune-join-1"
SERVER_FORMAT = "kilotune-server-1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
VALID = datetime.timedelta(days=3650)


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
    def key(self) -> Path:
        """The private key of the certificate."""
        return self.folder / "server.key"

    def join_path(self, name: str) -> Path:
        """Where the join file of a client was written; give it to the client and delete it here."""
        return self.folder / f"{name}.join"


@dataclass(frozen=True)
class JoinFile:
    """What a client needs to take part. `ca` is None only in a federation made insecure on purpose."""

    server: str
    federation: str
    client: str
    key: bytes = field(repr=False)
    ca: bytes | None = field(repr=False)


def init_server(folder: Path, host: str, port: int, clients: list[str], *, insecure: bool = False) -> ServerKeys:
    """Make the keys of a federation, or add clients to it. Existing keys and join files stay as they are."""
    for name in clients:
        if not NAME.fullmatch(name):
            raise FederationError(f"client name: got {name!r}, expected letters, digits, '.', '_', '-' (at most 64).")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    if (folder / "server.json").exists():
        keys = load_server_keys(folder)
        if (keys.host, keys.port, keys.insecure) != (host, port, insecure):
            made_for = f"{keys.host}:{keys.port}" + (" (insecure)" if keys.insecure else "")
            raise FederationError(f"{folder}: these keys are for {made_for}. Use that address or another folder.")
    else:
        if not insecure:
            _make_certificates(folder, host)
        keys = ServerKeys(folder, secrets.token_hex(8), host, port, insecure, {})
        _save(keys)
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
    for file in () if keys.insecure else (keys.certificate, keys.key):
        if not file.exists():
            raise FederationError(f"{file}: missing. Restore it, or make new keys in another folder.")
    return keys


def revoke(folder: Path, name: str) -> ServerKeys:
    """Forget a client: its join file opens nothing once the server has restarted."""
    keys = load_server_keys(folder)
    if name not in keys.clients:
        raise FederationError(f"client name: got {name!r}, expected one of {', '.join(keys.clients) or 'none'}.")
    del keys.clients[name]
    keys.join_path(name).unlink(missing_ok=True)
    _save(keys)
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
        if not isinstance(fields, dict) or fields.get("format") != JOIN_FORMAT:
            raise ValueError("it is not a kilotune join file")
        texts = {name: fields[name] for name in ("server", "federation", "client", "key")}
        if not all(isinstance(value, str) and value for value in texts.values()):
            raise ValueError("a field is not text")
        ca = None if fields.get("insecure") is True else fields["ca"].encode()
        private = serialization.load_pem_private_key(texts["key"].encode(), None)
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise ValueError("its key is of another kind")
        if ca is not None:
            x509.load_pem_x509_certificate(ca)
    except KeyError as error:
        raise FederationError(f"{path}: the field {error} is missing. Ask the server's owner for a new one.") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise FederationError(f"{path}: cannot use it: {error}. Ask the server's owner for a new one.") from None
    return JoinFile(texts["server"], texts["federation"], texts["client"], texts["key"].encode(), ca)


def _enrol(keys: ServerKeys, name: str) -> bytes:
    private = ec.generate_private_key(ec.SECP256R1())
    fields = {
        "format": JOIN_FORMAT,
        "server": address(keys.host, keys.port),
        "federation": keys.federation,
        "client": name,
        "key": _pem(private).decode(),
        "insecure": keys.insecure,
        "ca": "" if keys.insecure else (keys.folder / "ca.crt").read_text(),
    }
    _write_secret(keys.join_path(name), json.dumps(fields, indent=1).encode())
    return private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def key_id(public_key: bytes) -> str:
    """12 characters that stand for an enrolled public key (PEM) in every request."""
    return base64.urlsafe_b64encode(hashlib.sha256(public_key).digest()[:9]).decode()


def address(host: str, port: int) -> str:
    """HOST:PORT, with brackets around IPv6 numbers."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


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


def _make_certificates(folder: Path, host: str) -> None:
    ca_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kilotune federation CA")])
    ca_usage, server_usage = _usage(signs_certificates=True), _usage(signs_certificates=False)
    ca = (
        _builder(ca_name, ca_name, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(ca_usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    server_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kilotune server")])
    server = (
        _builder(server_name, ca_name, server_key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(server_usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(_names(host)), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(server_key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    _write_secret(folder / "ca.key", _pem(ca_key))
    _write_secret(folder / "server.key", _pem(server_key))
    (folder / "ca.crt").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    (folder / "server.crt").write_bytes(server.public_bytes(serialization.Encoding.PEM))


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)  # a client's clock may be behind
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    return builder.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(start + VALID)


def _names(host: str) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for name in dict.fromkeys((host, "localhost", "127.0.0.1")):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            names.append(x509.DNSName(name))
    return names


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_secret(path: Path, content: bytes) -> None:
    """Create a file only its owner can read; refuses to overwrite."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise FederationError(f"{path}: there is one already. Move it away, or use another folder.") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
