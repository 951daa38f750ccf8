"""Real servers on loopback that are there or gone."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from depthsearch.errors import ClusterError
from depthsearch.evaluation.lifeline import Address, Lifeline, listens


@contextmanager
def server(address: Address = ("127.0.0.1", 0)) -> Iterator[Address]:
    with socket.create_server(address) as found:
        yield found.getsockname()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_server_listens_until_it_is_closed() -> None:
    with server() as address:
        assert listens(address)
    assert not listens(address)


def test_while_both_are_there_nothing_is_said() -> None:
    with server() as node, server() as control:
        lifeline = Lifeline(node, control, 0.0)
        lifeline.check(now=True)
        assert lifeline.heard


def test_a_node_that_died_ends_the_run_at_the_next_look() -> None:
    clock = Clock()
    with server() as control:
        with server() as node:
            lifeline = Lifeline(node, control, 40.0, clock)
        clock.now += 0.5
        lifeline.check()  # too early to look
        clock.now += 0.5
        with pytest.raises(ClusterError, match="raylet"):
            lifeline.check()
        # Whoever asks again, such as for the figures of the end, hears the same.
        with pytest.raises(ClusterError, match="raylet"):
            lifeline.check(now=True)


def test_a_cluster_may_be_away_for_a_while() -> None:
    clock = Clock()
    with server() as control:
        lifeline = Lifeline(None, control, 40.0, clock)
    clock.now += 39
    lifeline.check()
    assert not lifeline.heard
    with server(control):
        clock.now += 39
        lifeline.check()
        assert lifeline.heard
    clock.now += 40
    with pytest.raises(ClusterError, match="GCS"):
        lifeline.check()


def test_what_was_never_reached_is_not_watched() -> None:
    with server() as address:
        pass
    lifeline = Lifeline(address, address, 0.0)
    lifeline.check(now=True)
    assert lifeline.heard
