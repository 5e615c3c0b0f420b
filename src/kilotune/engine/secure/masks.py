"""Masks and sealed shares: X25519 key agreement, HKDF-SHA256, AES-256-CTR as the mask, ChaCha20-Poly1305 as the seal.

All of it is `cryptography`; every secret comes from the operating system. A key that was derived here is used for one
message or one keystream only, which is why nonces and counters start at zero.
"""

import secrets

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kilotune.core.errors import WireError

KEY_BYTES = 32
TAG_BYTES = 16
SLICE_BYTES = 1 << 20  # of a keystream made at once
NO_NONCE = bytes(12)


class KeyPair:
    """An X25519 key for one purpose in one attempt at one round."""

    def __init__(self, secret: bytes | None = None) -> None:
        """Fresh, or from a private key that was shared."""
        self.secret = secrets.token_bytes(KEY_BYTES) if secret is None else secret
        self._private = X25519PrivateKey.from_private_bytes(self.secret)
        self.public = self._private.public_key().public_bytes_raw()

    def agree(self, public: bytes, binding: bytes, purpose: bytes) -> bytes:
        """The key that both ends derive. Raises WireError for a point that would give a known one."""
        try:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise WireError("secure aggregation: got a public key of low order. Its owner does not follow.") from None
        return derive_key(shared, binding, purpose)


def derive_key(secret: bytes, binding: bytes, purpose: bytes) -> bytes:
    """HKDF-SHA256, salted with what the round is bound to."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=binding, info=b"kilotune " + purpose).derive(secret)


def add_mask(words: np.ndarray, key: bytes, sign: int) -> None:
    """words ± keystream, modulo the size of a word, in place. `words` are unsigned and little-endian."""
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    step = SLICE_BYTES // words.dtype.itemsize
    for start in range(0, words.size, step):
        part = words[start : start + step]
        mask = np.frombuffer(stream.update(bytes(part.nbytes)), words.dtype)
        if sign > 0:
            part += mask
        else:
            part -= mask


def seal(key: bytes, content: bytes, label: bytes) -> bytes:
    """Encrypted and authenticated together with `label`, which does not travel."""
    return ChaCha20Poly1305(key).encrypt(NO_NONCE, content, label)


def unseal(key: bytes, sealed: bytes, label: bytes) -> bytes | None:
    """The content, or None when a bit or the label is another."""
    try:
        return ChaCha20Poly1305(key).decrypt(NO_NONCE, sealed, label)
    except InvalidTag:
        return None
