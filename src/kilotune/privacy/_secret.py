"""Secret Gaussians: the stream of AES-256 in counter mode under a key from the operating system, by Box and Muller.

A cryptographic stream, because what is released may be compared with a guess of the data: with a generator whose
state can be found from its outputs, one round's noise would give away the next. Every call has a key of its own.
"""

import secrets

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes


def gaussians(size: int, key: bytes | None = None) -> np.ndarray:
    """(size,) float64 standard normals; equal keys give equal numbers."""
    pairs = -(-size // 2)
    cipher = Cipher(algorithms.AES(secrets.token_bytes(32) if key is None else key), modes.CTR(bytes(16)))
    words = np.frombuffer(cipher.encryptor().update(bytes(16 * pairs)), "<u8").reshape(2, pairs)
    uniform = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # exact, never 0 or 1
    radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * np.pi * uniform[1]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]


def generator() -> np.random.Generator:
    """For choices that are never shown, such as who takes part: seeded with 128 secret bits."""
    return np.random.Generator(np.random.PCG64DXSM(secrets.randbits(128)))
