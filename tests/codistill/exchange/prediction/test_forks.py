from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator

import pytest

from codistill.exchange.prediction.forks import kept_from_children


@pytest.fixture
def listen() -> Iterator[Callable[[], socket.socket]]:
    """Opens sockets that listen, and closes them at the end."""
    opened: list[socket.socket] = []

    def make() -> socket.socket:
        opened.append(socket.create_server(("127.0.0.1", 0)))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def held_by_a_child(*descriptors: int) -> list[bool]:
    """Which of these are sockets in a child forked now; the others must be something harmless there."""
    child = os.fork()
    if child == 0:
        code = 255
        try:
            sockets = [stat.S_ISSOCK(os.fstat(one).st_mode) for one in descriptors]
            code = sum(held << place for place, held in enumerate(sockets))
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code != 255
    return [bool(code >> place & 1) for place in range(len(descriptors))]


def test_a_child_keeps_all_sockets_but_those_opened_in_the_block(listen: Callable[[], socket.socket]) -> None:
    before = listen()
    with kept_from_children():
        within = listen()
    after = listen()
    assert held_by_a_child(before.fileno(), within.fileno(), after.fileno()) == [True, False, True]
    socket.create_connection(within.getsockname()).close()  # ours still listens


def test_a_child_forked_within_blocks_lets_go_of_what_any_of_them_has_opened(
    listen: Callable[[], socket.socket],
) -> None:
    before = listen()
    with kept_from_children():
        first = listen()
        with kept_from_children():
            second = listen()
            assert held_by_a_child(before.fileno(), first.fileno(), second.fileno()) == [True, False, False]
        assert held_by_a_child(before.fileno(), first.fileno(), second.fileno()) == [True, False, False]
    assert held_by_a_child(before.fileno(), first.fileno(), second.fileno()) == [True, False, False]


def test_a_later_socket_of_the_same_number_is_kept(listen: Callable[[], socket.socket]) -> None:
    with kept_from_children():
        gone = listen()
    number = gone.fileno()
    gone.close()
    others = []
    while number not in (found := [one.fileno() for one in others]):
        others.append(listen())
        assert len(found) < 50
    assert held_by_a_child(number) == [True]


def test_a_block_that_fails_counts_as_one_that_ends(listen: Callable[[], socket.socket]) -> None:
    with pytest.raises(OSError, match="no more"), kept_from_children():
        within = listen()
        raise OSError("no more")
    assert held_by_a_child(within.fileno(), listen().fileno()) == [False, True]


def test_a_default_time_out_changes_none_of_the_sockets_that_are_looked_at(listen: Callable[[], socket.socket]) -> None:
    before = listen()
    socket.setdefaulttimeout(5.0)
    try:
        with kept_from_children():
            pass
        assert socket.getdefaulttimeout() == 5.0
        assert os.get_blocking(before.fileno())
    finally:
        socket.setdefaulttimeout(None)
