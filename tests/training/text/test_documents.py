"""Data files: every form that is read, and one line for what is wrong with them.

Data read as something it is not. Looked for: suffixes in another case, gz, csv and tsv, JSON arrays, Alpaca's fields,
content that contradicts the name, Parquet, Arrow, archives, UTF-16, Git LFS pointers, messages of weight 0.
"""

import errno
import gzip
import json
import os
import pathlib

import pytest
from support.documents import ASSISTANT, USER, lines

from mlx_redrafter import UserError
from mlx_redrafter.training.text import documents as documents_module
from mlx_redrafter.training.text.documents import Documents
from mlx_redrafter.training.text.formats import read_questions


def test_every_document_comes_back(tmp_path):
    """If this fails, documents of a file are lost, cut short or mixed up."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"text": "ä one"}, ensure_ascii=False).encode() + b"\r\n\n  \n"
        b'{"prompt": "1 + 1 =", "completion": " 2"}\n{"messages": '
        + json.dumps([USER, ASSISTANT]).encode()
        + b'}\n{"text": "the last"}'
    )
    (tmp_path / "b.json").write_text(json.dumps([{"text": "x"}, {"text": "y"}]))
    (tmp_path / "c.txt").write_text("plain\n")
    found = Documents([str(tmp_path / name) for name in ("a.jsonl", "b.json", "c.txt")], "--data")
    read = [found[i] for i in range(len(found))]
    assert [d.text for d in read] == ["ä one", " 2", "", "the last", "x", "y", "plain\n"]
    assert [d.where.replace(str(tmp_path), "") for d in read] == [
        "/a.jsonl line 1", "/a.jsonl line 4", "/a.jsonl line 5", "/a.jsonl line 6",
        "/b.json item 1", "/b.json item 2", "/c.txt line 1",
    ]  # fmt: skip
    assert read[1].prompt == "1 + 1 =" and read[2].messages == [USER, ASSISTANT]
    assert found.roles.tolist() == [False, True, True, False, False, False, False]
    assert [file["bytes"] for file in found.files] == [p.stat().st_size for p in sorted(tmp_path.iterdir())]


ALPACA = [
    {"instruction": "Add.", "input": "1 + 1", "output": "2"},
    {"instruction": 'Say, "hi".', "input": "", "output": "hi\nyou"},
]

EXPECTED = [("Add.\n\n1 + 1", "2"), ('Say, "hi".', "hi\nyou")]

AS_LINES = "".join(json.dumps(record) + "\n" for record in ALPACA)

AS_CSV = 'instruction,input,output\r\nAdd.,1 + 1,2\r\n"Say, ""hi"".",,"hi\nyou"\r\n'

SEMICOLONS = 'instruction;input;output\nAdd.;1 + 1;2\n"Say, ""hi"".";;"hi\nyou"\n'

WAYS = dict.fromkeys(("a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.dat", "a"), AS_LINES)

WAYS |= {"b.json": json.dumps(ALPACA), "b.JSON": json.dumps(ALPACA), "b": json.dumps(ALPACA, indent=1)}

WAYS |= {"c.csv": AS_CSV, "c.CSV": AS_CSV, "c": AS_CSV, "cbom.csv": "\ufeff" + AS_CSV, "csemicolons.csv": SEMICOLONS}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", WAYS)
def test_a_file_is_read_as_what_it_is(tmp_path, name, zipped):
    """If this fails, a drafter learns JSON syntax or commas, or a common file is refused."""
    data, path = WAYS[name].encode(), tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(data) if zipped else data)
    found = Documents([str(path)], "--data")
    assert [(found[i].prompt, found[i].text) for i in (1, 0)] == EXPECTED[::-1] and found.roles.all()
    assert found[1].where.removeprefix(f"{path} ") == {"b": "item 2", "c": "row 3"}.get(
        name[0], "row 3" if "csv" in name else "line 2"
    )
    assert [q.turns for q in read_questions(str(path), "--prompts")] == [[prompt] for prompt, _ in EXPECTED]


def test_zipped_text_and_tables_of_tabs(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("ä {}\n".encode()))
    (tmp_path / "b.tsv").write_text("Prompt\tcompletion \n1, 2\t3\n")
    found = Documents([str(tmp_path / "b.tsv"), str(tmp_path / "a.txt.gz")], "--data")
    assert [(d.prompt, d.text) for d in (found[0], found[1])] == [("1, 2", "3"), (None, "ä {}\n")]
    assert found[1].is_start and found[1].is_end


def test_folders_of_tables(tmp_path):
    """If this fails, a data set's card is learned in place of its data, or a program's table breaks a source tree."""
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "ages.csv").write_text("name,age\nx,1\n")
    assert [d["path"] for d in Documents([str(tmp_path)], "--data").files] == [f"{tmp_path}/README.md"]
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"train.parquet: is Parquet"):
        Documents([str(tmp_path)], "--data")
    (tmp_path / "train.csv").write_text(AS_CSV)
    assert [d["path"] for d in Documents([str(tmp_path)], "--data").files] == [f"{tmp_path}/train.csv"]
    (tmp_path / "train.JSONL.gz").write_bytes(gzip.compress(AS_LINES.encode()))
    assert [d["path"] for d in Documents([str(tmp_path)], "--data").files] == [f"{tmp_path}/train.JSONL.gz"]


def test_only_line_feeds_part_prompts(tmp_path):
    """If this fails, a prompt is cut where no editor shows a new line."""
    path = tmp_path / "a.txt"
    path.write_text("One\u2028two\x0cthree?\r\nFour?\n", "utf-8", newline="")
    assert [q.turns for q in read_questions(str(path), "--prompts")] == [["One\u2028two\x0cthree?"], ["Four?"]]
    [whole] = read_questions(str(path), "--prompts", whole=True)
    assert whole.turns == ["One\u2028two\x0cthree?\r\nFour?\n"]


def test_long_texts_are_pieces(tmp_path, monkeypatch):
    """If this fails, a piece of a long text is lost, read twice, or cut within a character."""
    monkeypatch.setattr(documents_module, "PIECE", 100)
    text = "".join(f"line {i} ä€\n" * (i % 3) for i in range(60)) + "€" * 150 + "\nend"
    (tmp_path / "a.txt").write_text(text, "utf-8")
    found = Documents([str(tmp_path / "a.txt")], "--data")
    read = [found[i] for i in range(len(found))]
    assert "".join(d.text for d in read) == text and len(read) > 12 and found.sizes.max() <= 100
    assert [d.is_start for d in read] == [True] + [False] * (len(read) - 1)
    assert [d.is_end for d in read] == [False] * (len(read) - 1) + [True]
    assert all(d.text.endswith("\n") for d in read[:8])
    line = int(read[3].where.rsplit(" ", 1)[1])
    assert text.split("\n")[line - 1] == read[3].text.split("\n")[0]


def test_folders(tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    for name in ("b.py", "a/c.swift", "a/d.bin", ".git/e.py", "node_modules/f.js", "a/deep/fixture.jsonl"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("text")
    (tree / "odd.txt").write_bytes(b"\xff\xfe")
    (tree / "empty.md").write_text(" \n")
    found = Documents([str(tree)], "--data")
    assert [d.text for d in (found[0], found[1])] == ["text", "text"] and len(found) == 2
    assert {file["path"].removeprefix(str(tree)) for file in found.files} >= {"/a/c.swift", "/b.py"}
    data = tmp_path / "data"
    data.mkdir()
    lines(data / "train.jsonl", {"text": "one"})
    (data / "README.md").write_text("a card")
    assert [file["path"] for file in Documents([str(data) + "/"], "--data").files] == [f"{data}/train.jsonl"]


def test_data_sets_of_the_hub(monkeypatch, tmp_path):
    """If this fails, a data set is looked for among the models, or its other files count as data."""
    asked = {}

    def download(repo, repo_type, allow_patterns):
        asked.update(repo=repo, kind=repo_type, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("mlx_redrafter.system.hub.snapshot_download", download)
    with pytest.raises(
        UserError, match=r"--data some/set: the data set has no .jsonl, .json, .csv or .txt file \(parquet"
    ):
        Documents(["some/set"], "--data")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "sub").mkdir()
    lines(tmp_path / "sub" / "a.jsonl", {"text": "one"})
    found = Documents(["some/set"], "--data")
    patterns = [
        f"*.{kind}{zipped}" for kind in ("jsonl", "ndjson", "json", "csv", "tsv", "txt") for zipped in ("", ".gz")
    ]
    assert asked == {"repo": "some/set", "kind": "dataset", "patterns": patterns}
    assert found[0].where == "some/set/sub/a.jsonl line 1" and len(found) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"a": 1, "b": 2}\n', r"line 3: found the fields a, b; expected messages"),
        ("a.jsonl", b'{"prompt": "x"}\n', r"line 1: found the fields prompt; expected .* completion, or text"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"line 2: found a JSON list, expected an object"),
        ("a.jsonl", b'{"text": 5}\n', r"line 1: text: found 5, expected text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: text: not valid Unicode at character 0"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"line 2: not UTF-8 \(byte 0xff\)"),
        ("a.jsonl", b'{"messages": []}\n', r"line 1: messages: expected a list of messages"),
        ("a.jsonl", b'{"messages": [{"content": "x"}]}\n', r"messages\[0\]: expected an object with role and content"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', r"messages\[0\].content: found null, expected text"),
        ("a.jsonl", b'{"conversations": [{"from": "gpt"}]}\n', r"conversations\[0\].value: found null, expected text"),
        ("a.jsonl", b"", r"--data .*a.jsonl: empty, no text found"),
        ("a.json", b'[{"text": "x"},\n{"text"}]', r"a.json line 2: not valid JSON"),
        ("a.json", b'{"text": "x"}', r"a.json: found a JSON dict, expected an array of records"),
        ("a.json", b'[{"text": "x"}, {}]', r"a.json item 2: found the fields \(none\); expected"),
        ("a.txt", b"one\ntwo \xff\n", r"a.txt line 2: not UTF-8 \(byte 0xff\)"),
        ("a.txt", b" \n", r"a.txt: empty, no text found"),
        ("a.parquet", b"PAR1\0\0", r"a.parquet: is Parquet, which is not read; convert it to JSON lines"),
        ("a.jsonl", b"PAR1\0\0", r"a.jsonl: is Parquet"),
        ("a.arrow", b"ARROW1\0\0", r"a.arrow: is Arrow, which is not read"),
        ("a.jsonl.zst", b"(\xb5/\xfd..", r"a.jsonl.zst: is compressed by zstd, which is not read; unpack it"),
        ("a.zip", b"PK\x03\x04", r"a.zip: is a zip archive"),
        ("a.txt", "so".encode("utf-16"), r"a.txt: is UTF-16, expected UTF-8"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", r"a.jsonl: is a Git LFS pointer"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}', mtime=0)[:-9], r"a.jsonl.gz: cannot be read \(Compressed file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n{', mtime=0), r"a.jsonl.gz line 2: not valid JSON"),
        ("a.csv", b"name,age\nx,1\n", r"a.csv row 2: found the fields age, name; expected messages"),
        ("a.csv", b"prompt,completion\nx,y\nz\n", r"a.csv row 3: 1 cells, expected 2, as in the first row"),
        ("a.csv", b'prompt,completion\nx,"y\n', r"a.csv row 2: not valid CSV"),
        ("a.csv", b"text\n\xff\n", r"a.csv line 2: not UTF-8"),
        ("a.csv", b"text\n", r"a.csv: empty, no text found"),
        ("a.jsonl", b'{"instruction": "x", "input": 1, "output": "y"}', r"line 1: input: found 1, expected text"),
        ("a.jsonl", b'{"instruction": "x", "input": "y"}', r"found the fields input, instruction; expected messages"),
        ("a.jsonl", b'{"messages": [{"role": "a", "content": "x", "weight": 0.5}]}', r"weight: found 0.5, expected 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file(tmp_path, name, content, message):
    """If this fails, a mistake in a file of a million lines has to be searched for."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        Documents([str(tmp_path / name)], "--data")
    assert "\n" not in str(error.value)


@pytest.fixture
def no_permission(monkeypatch):
    """While it lasts, names that begin with "secret" may not be read, as for a user who is not root."""

    def denied(real):
        def guarded(path, *args, **kwargs):
            if pathlib.Path(path).name.startswith("secret"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *args, **kwargs)

        return guarded

    for owner, name in ((pathlib.Path, "open"), (pathlib.Path, "iterdir"), (os, "scandir")):
        monkeypatch.setattr(owner, name, denied(getattr(owner, name)))


@pytest.mark.parametrize("name", ["secret.jsonl", "secret.txt", "secret.csv", "secret.json.gz", "secret"])
def test_what_may_not_be_read(tmp_path, no_permission, name):
    """If this fails, a file of somebody else's ends in a traceback."""
    path = tmp_path / name
    path.mkdir() if name == "secret" else path.touch()
    with pytest.raises(UserError, match=f"{name}: cannot be read .Permission denied."):
        Documents([str(path)], "--data")
    if name != "secret":
        with pytest.raises(UserError, match=f"{name}: cannot be read .Permission denied."):
            read_questions(str(path), "--prompts")


def test_a_folder_below_that_may_not_be_read(tmp_path, no_permission):
    """If this fails, a part of a source tree is left out without a word."""
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "secret").mkdir()
    with pytest.raises(UserError, match=r"--data .*: cannot be read .Permission denied."):
        Documents([str(tmp_path)], "--data")


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"--data nowhere.jsonl: no such file or directory"):
        Documents(["nowhere.jsonl"], "--data")
    with pytest.raises(UserError, match=r"empty, no .jsonl file and no text or source file below it"):
        Documents([str(tmp_path)], "--data")
