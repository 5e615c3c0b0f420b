"""Certificates of a federation: its own CA, the server's certificate, and one per client. P-256 keys throughout."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kilotune.core.errors import FederationError

VALID = datetime.timedelta(days=3650)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def load_private(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """Raises ValueError for anything but a private P-256 key."""
    key = load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("its key is of another kind")
    return key


def owner(der: bytes) -> tuple[str, bytes]:
    """(name, public key as PEM) of a certificate that TLS has verified. Raises ValueError when it has no one name."""
    certificate = x509.load_der_x509_certificate(der)
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1:
        raise ValueError(f"a certificate with {len(names)} names")
    pem = certificate.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return str(names[0].value), pem


def authority(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The CA's own certificate (PEM)."""
    name = _name("kilotune federation CA")
    return (
        _builder(name, name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )


def server_certificate(folder: Path, key: ec.EllipticCurvePrivateKey, host: str) -> bytes:
    """For the given host, `localhost` and 127.0.0.1."""
    names = x509.SubjectAlternativeName(_hosts(host))
    return _signed(folder, "kilotune server", key, ExtendedKeyUsageOID.SERVER_AUTH, names)


def client_certificate(folder: Path, key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """Its one name is the client's."""
    return _signed(folder, name, key, ExtendedKeyUsageOID.CLIENT_AUTH, None)


def _signed(
    folder: Path,
    name: str,
    key: ec.EllipticCurvePrivateKey,
    purpose: x509.ObjectIdentifier,
    hosts: x509.SubjectAlternativeName | None,
) -> bytes:
    try:
        ca_key = load_private((folder / "ca.key").read_bytes())
    except FileNotFoundError:
        raise FederationError(
            f"{folder / 'ca.key'}: missing, so nothing can be certified. Put it back while you enrol or rotate."
        ) from None
    builder = (
        _builder(_name(name), _name("kilotune federation CA"), key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    )
    if hosts is not None:
        builder = builder.add_extension(hosts, critical=False)
    return builder.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)  # a client's clock may be behind
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    return builder.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(start + VALID)


def _hosts(host: str) -> list[x509.GeneralName]:
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
