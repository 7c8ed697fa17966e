"""Files that cannot be read or written: one line, and what was there before stays whole.

Looked for: a full disk for JSON and for mlx's own savers, a directory that may not be written, files that may not be
read, a directory in a file's place.
"""

import os

import mlx.core as mx
import pytest

from mlx_redrafter import UserError
from mlx_redrafter.system.files import check_readable, read_json, replace_file, require_free, write_json


def full(path):
    """Lets the temporary file that is written before `path` lie on a full disk."""
    path.with_name(f".{os.getpid()}.{path.name}").symlink_to("/dev/full")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("name", ["x.json", "x.safetensors"])
def test_a_full_disk(tmp_path, name):
    """If this fails, a disk that fills up in mid-work ends in a traceback, or takes the earlier file with it."""
    path = tmp_path / name
    path.write_text("before")
    full(path)
    with pytest.raises(UserError, match=f"{name}: cannot be written"):
        if name.endswith(".json"):
            write_json(path, {"a": "b" * 99})
        else:
            with replace_file(path) as file:
                mx.save_safetensors(str(file), {"x": mx.zeros((999, 99))})
    assert path.read_text() == "before" and [each.name for each in tmp_path.iterdir()] == [name]


def test_other_errors_of_mlx_are_not_the_disk_s(tmp_path):
    """If this fails, a product that fails while a file is open is reported as a full disk."""
    with pytest.raises((RuntimeError, ValueError), match="matmul"), replace_file(tmp_path / "x.safetensors"):
        mx.eval(mx.zeros((2, 3)) @ mx.zeros((2, 3)))
    assert not list(tmp_path.iterdir())


def test_what_may_not_be_read_or_written(tmp_path, without_privileges):
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "x.json").chmod(0)
    with pytest.raises(UserError, match=r"x.json: may not be read \(permission denied\)"):
        read_json(tmp_path / "x.json")
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0)
    for use in (lambda: read_json(closed / "x.json"), lambda: require_free(closed / "new")):
        with pytest.raises(UserError, match=r"closed/.*permission denied"):
            use()
    with pytest.raises(UserError, match=r"closed/x.json: cannot be written"):
        write_json(closed / "x.json", {})
    closed.chmod(0o700)
    with pytest.raises(UserError, match="closed: not a file"):
        check_readable(closed)
