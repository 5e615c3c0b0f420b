"""Relay: nothing is summed. Every peer's steps are passed on, each with 1/n of the whole, for all peers to add up.

Source: Zelikman et al., "Just One Byte (per gradient): A Note on Low-Bandwidth Decentralized Language Model Finetuning
Using Shared Randomness", arXiv 2306.10015: peers without a leader that fetch one another's scalars.
Departs: the transport has no messages between peers, so a server gathers a round's bytes and hands all of them to all.
It needs no trust for what they come to: the sum is made by every peer from the bytes listed, and each finds its own
there. It can still leave a peer out, or speak for one that was away (docs/flower.md).
"""

from __future__ import annotations

from typing import cast

import numpy as np

from kilotune.aggregation import Aggregation, SeedUpdate, State, Update


class Relay(Aggregation):
    """Pairs of all clients side by side, by sender."""

    takes = "seeds"

    def combine(self, updates: list[Update], weights: np.ndarray, state: State) -> SeedUpdate:
        """Every pair that came, times its client's weight (float64); pairs of one sender stay in their order."""
        pairs = [cast(SeedUpdate, update) for update in updates]
        indices = np.concatenate([update.indices for update in pairs])
        coefs = np.concatenate([p * update.coefs.astype(np.float64) for p, update in zip(weights, pairs, strict=True)])
        known = [update.senders for update in pairs if update.senders is not None]
        if len(known) < len(pairs):  # nobody says whose they are
            order = np.lexsort((coefs, indices))
            return SeedUpdate(indices[order], coefs[order])
        senders = np.concatenate(known)
        order = np.argsort(senders, kind="stable")
        return SeedUpdate(indices[order], coefs[order], senders=senders[order])


METHOD = Relay
