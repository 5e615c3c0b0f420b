"""Operations: what the owner of a federation server watches it with — live page, metrics, logs, checks.

Everything here is read off the events that the rounds emit; nothing here can change a result.
"""
