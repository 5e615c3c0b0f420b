"""Certificate of a withdrawal: what was taken out of a run, how exactly, and what the run was before and is now.

JSON. Signature: ECDSA with SHA-256 on P-256, r and s as 32 bytes each, in hex, over `kilotune-withdrawal-1` and the
JSON (sorted keys, no spaces) of everything but the signature. The key is the server's, or one made for this
certificate alone; `fingerprint` is the SHA-256 of the public key (DER).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from kilotune.core.errors import RunError, WireError
from kilotune.engine.files import write_json
from kilotune.engine.flower.certificates import public_pem
from kilotune.engine.flower.seals import load_public, sign, verify
from kilotune.engine.rounds.ledger import canonical

FORMAT = "kilotune-withdrawal-1"
ABOUT = ("client", "how", "statement", "removed", "rounds_kept", "rounds", "base_digest", "recipe_id")
FIELDS = {"format", *ABOUT, "old", "new", "time", "version", "signer", "key", "fingerprint", "signature"}


@dataclass(frozen=True)
class _Content:
    """What is signed."""

    fields: dict[str, Any]

    def to_bytes(self) -> bytes:
        return FORMAT.encode() + canonical({k: v for k, v in self.fields.items() if k != "signature"})


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """64 hex digits that stand for a public key."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def signed(content: dict[str, Any], key: ec.EllipticCurvePrivateKey, signer: str) -> dict[str, Any]:
    """The certificate of a withdrawal. `signer`: whose key it is, in words."""
    known = {"format": FORMAT, "signer": signer, "key": public_pem(key).decode()}
    fields = {**content, **known, "fingerprint": fingerprint(key.public_key())}
    whole = {**fields, "signature": sign(key, _Content(fields)).hex()}
    assert whole.keys() == FIELDS
    return whole


def write(path: Path, certificate: dict[str, Any]) -> None:
    write_json(path, certificate)


def read(path: Path) -> dict[str, Any]:
    """A certificate whose signature fits. Raises WireError for anything else."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError):
        raise WireError(f"{path}: not readable as a certificate.") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT or fields.keys() != FIELDS:
        raise WireError(f"{path}: this is no certificate of a withdrawal, or fields of it were added or removed.")
    try:
        key = load_public(str(fields["key"]).encode())
        fits = verify(key, _Content(fields), bytes.fromhex(str(fields["signature"])))
    except ValueError:
        fits = False
    if not fits or fields["fingerprint"] != fingerprint(key):
        raise WireError(f"{path}: the signature does not fit: the certificate was altered since it was signed.")
    return fields
