"""A call on a stack of its own."""

import threading

import pytest

from mlx_redrafter.constraints.room import STACK, with_room


def test_a_call_has_room():
    """If this fails, a deep schema ends the process, or every thread of a server takes such a stack."""
    usual = threading.stack_size()
    seen = with_room(lambda: (threading.current_thread(), threading.stack_size()))
    assert seen[0] is not threading.current_thread() and seen[1] in (STACK, usual)
    assert threading.stack_size() == usual
    with pytest.raises(KeyError):
        with_room(lambda: {}["missing"])
