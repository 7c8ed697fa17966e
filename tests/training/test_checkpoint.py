"""Checkpoints: what a full disk leaves."""

import resource
import signal

import mlx.core as mx
import pytest

from mlx_redrafter import UserError
from mlx_redrafter.training.checkpoint import Progress, restore, save


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    """If this fails, a disk that fills up in mid-checkpoint ends in a traceback, or takes the run with it."""
    path, weights = tmp_path / "checkpoint.safetensors", {"a": mx.ones((100_000,))}
    save(path, weights, {"step": mx.array(1)}, Progress(7))
    usual, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, usual[1]))
    try:
        with pytest.raises(UserError, match=r"checkpoint.safetensors: cannot be written \(.*Unable to write"):
            save(path, {"a": mx.zeros((100_000,))}, {"step": mx.array(2)}, Progress(8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        signal.signal(signal.SIGXFSZ, ignored)
    found, _, progress = restore(path, weights)
    assert mx.array_equal(found["a"], weights["a"]) and progress.done == 7
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
