"""The heartbeat knows which ranks are lost to a run: a regular end is none, whatever its order."""

import json
import socket
import threading
import time
from contextlib import suppress

import pytest
import torch.distributed as dist

from nesso_tune.distributed import heartbeat
from nesso_tune.distributed.heartbeat import ADDRESS_KEY, Heartbeat, RankState
from tests.support.logs import logged


@pytest.fixture
def ranks(monkeypatch):
    """Three ranks in one process, without a grace period, and what each of them calls lost."""
    monkeypatch.setattr(heartbeat, "POLL_S", 0.05)
    store, lost = dist.HashStore(), {}
    started = [Heartbeat(rank, 3, lambda states, rank=rank: lost.setdefault(rank, states), 0) for rank in range(3)]
    for one in started:
        one.start(store, "localhost", 29500)
    wait_until(lambda: len(started[0]._connections) == 2)
    yield started, lost
    for one in started:
        one.end_run()
        disconnect(one)


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def disconnect(one):
    """As the operating system does when the process ends."""
    with one._lock:  # all at once: its thread must not tell one rank of the end of another in between
        for connection in one._connections:
            with suppress(OSError):  # the other side was first
                connection.socket.shutdown(socket.SHUT_RDWR)


def settle():
    time.sleep(0.5)  # many times POLL_S


def test_ranks_that_end_well_in_any_order_are_not_lost(ranks):
    (first, second, third), lost = ranks
    second.end_run()
    disconnect(second)
    settle()
    first.end_run()
    disconnect(first)
    settle()
    third.end_run()
    settle()
    assert lost == {}


@pytest.mark.parametrize("gone", [0, 1])
def test_a_rank_that_ends_without_a_word_is_lost_to_all_others(ranks, gone):
    started, lost = ranks
    disconnect(started[gone])
    others = {0, 1, 2} - {gone}
    wait_until(lambda: others <= set(lost))
    assert all(RankState(gone, gone=True) in lost[rank] for rank in others)


def test_the_error_of_rank_0_reaches_ranks_that_are_still_connecting(monkeypatch):
    """Rank 0 may fail in the moment after all have joined, e.g. by data that cannot be read."""
    monkeypatch.setattr(heartbeat, "POLL_S", 0.05)
    store, lost = dist.HashStore(), []
    first, second = (Heartbeat(rank, 2, lost.extend, 0) for rank in range(2))
    first.start(store, "localhost", 29500)
    later = threading.Timer(0.3, second.start, (store, "localhost", 29500))
    later.start()
    first.end_run(3)
    first._server.close()  # the process is gone
    disconnect(first)
    wait_until(lambda: lost)
    assert [(state.rank, state.exit_code) for state in lost] == [(0, 3)]
    second.end_run()
    disconnect(second)


def test_the_exit_code_of_a_failed_rank_reaches_the_others_even_if_it_is_gone_at_once(ranks):
    started, lost = ranks
    started[2].end_run(6)
    disconnect(started[2])
    wait_until(lambda: {0, 1} <= set(lost))
    for rank in (0, 1):
        (state,) = lost[rank]
        assert (state.rank, state.exit_code) == (2, 6)


def test_an_error_of_its_own_gives_the_main_thread_time(ranks):
    started, lost = ranks
    started[0].expect_own_error()
    started[1].end_run(6)
    settle()
    assert started[0].lost_ranks() != []
    assert 0 not in lost
    started[0].end_run(6)
    settle()
    assert 0 not in lost


def test_a_rank_that_all_leave_after_an_error_is_not_lost_to_the_next_run(ranks):
    started, lost = ranks
    for one in started:
        one.expect_own_error()
    for one in started:
        one.end_run(2)
    for one in started:
        one.begin_run()
    settle()
    assert lost == {}


def test_a_rank_that_ended_before_the_next_run_of_a_chain_is_lost_to_it(ranks):
    started, lost = ranks
    for one in started:
        one.end_run()
    disconnect(started[1])
    settle()
    assert lost == {}, "the program may be finished"
    started[0].begin_run()
    started[2].begin_run()
    wait_until(lambda: {0, 2} <= set(lost))
    assert [state.rank for state in lost[2]] == [1]


def test_a_stranger_is_not_listened_to():
    store = dist.HashStore()
    first = Heartbeat(0, 2, lambda states: None)
    first.start(store, "localhost", 29500)
    host, port, _ = json.loads(store.get(ADDRESS_KEY))
    with socket.create_connection((host, port)) as stranger:
        stranger.sendall(b"guess 1\n" + json.dumps({"rank": 1, "exit_code": 5}).encode() + b"\n")
        stranger.settimeout(20)
        assert stranger.recv(10) == b"", "it is disconnected"
    assert first.lost_ranks() == []
    first.end_run()


def test_a_rank_that_cannot_connect_says_so(monkeypatch):
    store = dist.HashStore()
    with socket.create_server(("localhost", 0)) as closed:
        port = closed.getsockname()[1]
    store.set(ADDRESS_KEY, json.dumps(["localhost", port, "token"]))
    monkeypatch.setenv("RANK", "1")
    with logged() as messages:
        Heartbeat(1, 2, lambda states: None).start(store, "localhost", 29500)
    (message,) = messages
    assert "no heartbeat" in message
    assert "notices it after distributed.timeout_s" in message
