"""Several processes: how many there are, and what they tell each other.

That all write one text is shown in promises/test_several_ranks.py.
"""

import queue
import socket
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import create_autospec

import mlx.core as mx
import pytest

from mlx_redrafter.errors import UserError
from mlx_redrafter.system import ranks


@pytest.fixture
def two(monkeypatch):
    group = create_autospec(mx.distributed.Group, instance=True)
    group.size.return_value = 2
    monkeypatch.setattr(mx.distributed, "init", create_autospec(mx.distributed.init, return_value=group))


def test_nothing_is_started_where_nothing_launched(monkeypatch, two):
    """If this fails, every text of every single process pays for a backend."""
    for name in ranks.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    ranks.number_of_ranks.cache_clear()
    assert ranks.number_of_ranks() == 1 and not mx.distributed.init.called  # type: ignore[attr-defined]
    monkeypatch.setenv("MLX_RANK", "0")
    ranks.number_of_ranks.cache_clear()
    assert ranks.number_of_ranks() == (2 if mx.distributed.is_available() else 1)
    ranks.number_of_ranks.cache_clear()


@pytest.fixture
def three(monkeypatch):
    """Three ranks in one process, connected, and what each of them ended with."""
    cards, ended = queue.Queue[bytes](), queue.Queue[tuple[int, str, int, int]]()

    def card(self, content):
        for _ in range(self.size - 1 if self.first else 0):
            cards.put(content)
        return content or cards.get(timeout=30)

    monkeypatch.setattr(ranks.Ranks, "_card", card)
    monkeypatch.setattr(
        ranks.Ranks, "end", lambda self, line, code, speaker: ended.put((self.rank, line, code, speaker))
    )
    groups = [create_autospec(mx.distributed.Group, instance=True) for _ in range(3)]
    for rank, group in enumerate(groups):
        group.rank.return_value, group.size.return_value = rank, 3
    with ThreadPoolExecutor(3) as pool:
        yield (found := list(pool.map(ranks.Ranks, groups))), ended
        list(pool.map(ranks.Ranks.leave, found))  # each waits for the others


def test_all_hear_what_the_first_one_says(three):
    """If this fails, processes that compute together do different things."""
    found, ended = three
    for value in ("a plan", {"of": [1, 2]}):
        assert [one.share(value if one.first else "another") for one in found] == [value] * 3
    facts = {"seed": "1", "model": "m"}
    for one in found[1:]:
        one.check_same(facts)
    found[0].check_same({"seed": "1", "only here": "x"})
    for one in found[1:]:
        one.check_same(facts | {"seed": str(one.rank)})
    with pytest.raises(UserError, match="rank 2: seed is 2, expected 1, as on rank 0"):
        found[0].check_same(facts)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(ranks.Ranks.leave, found))
    assert ended.empty()


def test_who_ends_early_is_noticed(three, monkeypatch):
    """If this fails, processes wait in a collective for ever for one whose script has called sys.exit."""
    found, ended = three
    monkeypatch.setattr(ranks, "LEAVING", 0.1)
    found[0].leave()
    assert ended.empty()  # the others may be at what takes them longer
    for link in found[0]._links.values():
        link._connection.shutdown(socket.SHUT_RDWR)
    assert {ended.get(timeout=30)[:2] for _ in range(2)} == {
        (rank, "rank 0 of 3 is gone, the others cannot go on") for rank in (1, 2)
    }


@pytest.mark.parametrize(("gone", "expected"), [(1, {(0, 0)}), (0, {(1, 1), (2, 1)})])
def test_who_is_gone_is_noticed(three, gone, expected):
    """If this fails, the others wait for a process that died for ever, or nobody says which."""
    found, ended = three
    for link in found[gone]._links.values():
        link._connection.shutdown(socket.SHUT_RDWR)
    while expected:  # the one that is gone notices as well
        rank, line, code, speaker = ended.get(timeout=30)
        assert code == 1
        if line.startswith(f"rank {gone} of 3 is gone"):
            expected = expected - {(rank, speaker)}


def test_one_that_fails_ends_all(three):
    """If this fails, a mistake that one process finds leaves the others waiting, or is not told."""
    found, ended = three
    found[2]._links[0].send(ranks.FAILED, ("rank 2: no disk", 2))
    assert ended.get(timeout=10) == (0, "rank 2: no disk", 2, 0)
    found[0]._links[1].send(ranks.FAILED, ("rank 2: no disk", 2))
    assert ended.get(timeout=10) == (1, "", 2, 0)  # rank 0 has said it


def test_work_that_fails(three, monkeypatch):
    """If this fails, an error of one process leaves the others at another place, or one that all have ends them."""
    found, ended = three
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda one: one.all_failed("no such token"), found))
    assert ended.empty()
    monkeypatch.setattr(ranks, "FAILING", 0.1)
    monkeypatch.setattr(ranks.time, "sleep", lambda _: None)
    for one in (found[1], found[0]):  # while the third is at its work
        one.all_failed("no room")
        assert ended.get(timeout=10) == (one.rank, "no room", 1, 0)
