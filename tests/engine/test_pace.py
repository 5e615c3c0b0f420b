"""Pace: who is told to be slow, and who is not."""

from kilotune.engine.pace import Pace, Slow


def rounds(*seconds: dict[str, float], group: int = -1) -> list[list[Slow]]:
    pace, told = Pace(), []
    for times in seconds:
        for client, spent in times.items():
            pace.note(client, group, spent)
        told.append(pace.slow())
    return told


def test_a_client_three_times_slower_is_told_at_the_second_time_and_again_at_the_fourth():
    """Kills: one slow round that is told; a client that is told in every round; counts that survive the telling."""
    slow, quick = {"ada": 1.0, "bob": 1.0, "cyd": 3.1}, {"ada": 1.0, "bob": 1.0, "cyd": 3.0}
    told = [[], [], [Slow("cyd", 3.1, 1.0)], [], [Slow("cyd", 3.1, 1.0)]]
    assert rounds(slow, quick, slow, slow, slow) == told


def test_clients_are_compared_with_their_own_class_and_two_are_no_class():
    """Kills: forward-only clients with twenty steps told slow beside those with two; a verdict between two clients."""
    pace = Pace()
    for _ in range(2):
        for client, group, spent in (("a", 0, 1.0), ("b", 0, 1.1), ("c", 0, 0.9), ("d", 1, 9.0), ("e", 1, 30.0)):
            pace.note(client, group, spent)
        assert pace.slow() == []


def test_what_is_no_number_is_left_out():
    """Kills: a client's claim that ends the server's round."""
    pace = Pace()
    for client in "abc":
        pace.note(client, -1, "fast")
    assert pace.slow() == []
