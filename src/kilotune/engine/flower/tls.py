"""Mutual TLS: the server asks every client for a certificate of the federation, clients hold the server to one key."""

import ssl
import tempfile
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from kilotune.engine.flower.certificates import owner
from kilotune.engine.flower.keys import JoinFile, ServerKeys

CERTIFICATE = "certificate"
"""Key of an ASGI scope's state: (name, public key) of the certificate a connection was opened with."""


class CertifiedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which also tells the application whose certificate a connection has."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        der = tls.getpeercert(binary_form=True) if tls is not None else None
        if der is not None:
            try:
                self.app_state = {**self.app_state, CERTIFICATE: owner(der)}
            except ValueError:
                transport.abort()


def demand_certificates(config: uvicorn.Config, keys: ServerKeys) -> None:
    """TLS 1.3 with client certificates, and no tickets: a session that outlives its handshake could outlive its key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(keys.certificate, keys.key)
    context.load_verify_locations(keys.authority)
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0
    config.load()
    config.ssl = context


class PinnedContext(ssl.SSLContext):
    """Refuses a server whose certificate is in order but not for the one key in the join file."""

    pinned: bytes

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        """The handshake, then the comparison; nothing has been sent by then."""
        wrapped = super().wrap_socket(*args, **kwargs)
        der = wrapped.getpeercert(binary_form=True)
        if der is None or owner(der)[1] != self.pinned:
            wrapped.close()
            raise ssl.SSLCertVerificationError("CERTIFICATE_VERIFY_FAILED: not the key of the join file")
        return wrapped


def client_context(join: JoinFile) -> ssl.SSLContext | bool:
    """What httpx verifies the server by, and shows it."""
    if join.ca is None or join.certificate is None:
        return False  # plain HTTP: there is no certificate to look at
    context = PinnedContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=join.ca.decode())
    context.pinned = join.server_key
    with tempfile.TemporaryDirectory() as folder:  # only its owner can enter; OpenSSL reads keys from files alone
        path = Path(folder) / "pair.pem"
        path.write_bytes(join.key + join.certificate)
        context.load_cert_chain(path)
    return context
