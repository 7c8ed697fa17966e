"""Reading rows with the target: once, within a budget."""

import numpy as np
from support import make_model
from support.rows import TextRows, random_rows, teacher_of

from mlx_redrafter.target.model import Target


def test_teacher_reads_a_row_once(tmp_path, monkeypatch):
    """If this fails, the byte budget buys nothing, is overrun, or a kept row differs from a read one."""
    target, rows = Target(make_model()), TextRows(random_rows(6))
    rows.counts[2, 7:] = False  # a short answer, and nothing behind it
    read, real = [], target.forward
    monkeypatch.setattr(
        target, "forward", lambda tokens, *a, **k: read.append(tokens.shape[1]) or real(tokens, *a, **k)
    )
    reader = teacher_of(target, rows, tmp_path / "a", budget=10**9)
    first = reader.read(np.array([0, 1, 2]))[1]
    again = reader.read(np.array([2, 1]))[1]
    assert read == [12, 12, 7] and not first["hidden"][2, 7:].any()
    assert (first["hidden"][1] == again["hidden"][1]).all() and (first["ids"][2] == again["ids"][0]).all()
    alone = teacher_of(target, rows, tmp_path / "c", budget=0).read(np.array([1]))[1]
    assert (first[1] == alone[0]).all() and read.pop() == 12
    reader.close()
    later = teacher_of(target, rows, tmp_path / "a", budget=10**9).read(np.array([2, 1]))[1]
    assert len(read) == 3 and (later["shares"] == again["shares"]).all()
    read.clear()
    scarce = teacher_of(target, rows, tmp_path / "b", budget=0)
    for _ in range(2):
        scarce.read(np.array([0, 1]))
    assert read == [12] * 4 and (tmp_path / "b" / "records.bin").stat().st_size == 0
