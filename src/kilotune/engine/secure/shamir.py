"""Shamir shares: f(x) = secret + a_1 x + .. + a_(t-1) x^(t-1) mod p; any t points give f(0), fewer give nothing.

Source: Shamir, "How to Share a Secret", Communications of the ACM 22(11), 1979.
Departs: `cryptography` has no secret sharing, so these are Python integers; they do not take constant time, which an
observer of the very process could measure.
Wire: a share is f(x) as 33 bytes, little-endian; x = 1 .. count is the place of its holder and does not travel.
"""

import secrets

PRIME = 2**256 + 297  # the smallest prime above 2^256, so that every 32-byte secret is below it
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: bytes, count: int, threshold: int) -> list[bytes]:
    """Shares for x = 1 .. count, of which `threshold` are enough."""
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= count:
        raise ValueError(f"shamir: got {len(secret)} bytes, {threshold} of {count}.")
    polynomial = [int.from_bytes(secret, "little"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = []
    for x in range(1, count + 1):
        value = 0
        for coefficient in reversed(polynomial):
            value = (value * x + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "little"))
    return shares


def at_zero(points: list[int]) -> list[int]:
    """Lagrange's factors: f(0) = Σ factor_i · f(points_i). The same for every secret shared at these points."""
    factors = []
    for x in points:
        above, below = 1, 1
        for other in points:
            if other != x:
                above, below = above * other % PRIME, below * (other - x) % PRIME
        factors.append(above * pow(below, -1, PRIME) % PRIME)
    return factors


def join(shares: list[bytes], factors: list[int]) -> bytes | None:
    """The secret, from as many shares as the threshold and the factors of their points; None when there is none."""
    values = [int.from_bytes(share, "little") for share in shares]
    secret = sum(value * factor for value, factor in zip(values, factors, strict=True)) % PRIME
    return secret.to_bytes(SECRET_BYTES, "little") if secret < 1 << (8 * SECRET_BYTES) else None
