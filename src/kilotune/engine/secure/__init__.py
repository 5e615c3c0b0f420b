"""Secure aggregation: the server learns the sum of a round's updates and nothing about a single one.

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, the protocol
against an honest-but-curious server (double masking, Shamir shares, recovery from dropouts).
Departs: keys and shares of a round are bound to the whole table of public keys; commitments let the server refuse a
wrong share; a client reveals shares for one set of survivors per round, also when the round is repeated.

Modules: `fixed` (numbers to integers), `shamir` (shares), `masks` (keys, keystreams, sealed shares), `wire` (messages
and their sizes), `client` and `server` (one side each, no network), `rounds` (the server's side over an Exchange),
`capabilities` (what can be summed). docs/secure_aggregation.md says what is protected and what is not.
"""
