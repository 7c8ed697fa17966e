"""Prompt files of every format come out as they are, and a bad one is named."""

import gzip
import json

import pytest
from mlx_redrafter.benchmarks.prompts import Prompt, evenly, read_prompts, token_ids
from support import SHARED

from mlx_redrafter.errors import UserError


@pytest.fixture
def files(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.mark.parametrize("name, count, kinds", [("mt_bench", 80, 8), ("spec_bench", 480, 13)])
def test_real_questions(name, count, kinds):
    """If this fails, the files that papers report on cannot be measured, or only in part."""
    path = SHARED / "prompts" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"../shared/prompts/{name}.jsonl is not here")
    prompts = read_prompts([str(path)])
    assert len(prompts) == count and len({p.category for p in prompts}) == kinds
    assert all(p.message for p in prompts)
    assert prompts[0].text.startswith("Compose an engaging travel blog post") and prompts[0].category == "writing"
    # A few of them still come from all over the file.
    assert len({p.category for p in evenly(prompts, 4 * kinds)}) >= 0.6 * kinds
    if name == "mt_bench":
        assert len({p.category for p in evenly(prompts, 8)}) == 8


@pytest.mark.parametrize("packed", [False, True])
def test_tasks_of_human_eval(files, packed):
    lines = [{"task_id": f"HumanEval/{i}", "prompt": f"def f{i}():\n", "test": ""} for i in range(3)]
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path = files("HumanEval.jsonl" + ".gz" * packed, gzip.compress(text) if packed else text)
    assert read_prompts([path])[1:] == [Prompt(f"def f{i}():\n", "HumanEval") for i in (1, 2)]


def test_text_and_directories(files, tmp_path):
    files("b.py", "import os\n")
    files("a.txt", "Once\n\nupon")
    files("image.png", b"\x89PNG\xff")
    found = read_prompts([str(tmp_path), str(tmp_path / "b.py")])
    assert [(p.text, p.category, p.message) for p in found] == [
        ("Once\n\nupon", "a.txt", False),
        ("import os\n", "b.py", False),
        ("import os\n", "b.py", False),
    ]


def test_what_tools_leave_in_a_directory_is_no_prompt(files, tmp_path):
    """If this fails, a project as a directory of prompts measures its dependencies and caches."""
    for hidden in (".git", "node_modules", "__pycache__", ".venv", "below/.git"):
        (tmp_path / hidden).mkdir(parents=True)
        files(f"{hidden}/a.py", "not asked for\n")
        files(f"{hidden}/b.jsonl", "{}")
    files("below/c.py", "import os\n")
    files("below/tasks.jsonl", '{"turns": ["Why?"], "category": "qa"}')
    assert read_prompts([str(tmp_path)]) == [Prompt("import os\n", "c.py"), Prompt("Why?", "qa", True)]


def test_a_system_message_goes_along(files):
    said = [{"role": role, "content": text} for role, text in (("system", "Be brief."), ("user", "Why?"))]
    [prompt] = read_prompts([files("q.jsonl", json.dumps({"messages": said}))])
    assert prompt == Prompt("Why?", "q", True, "Be brief.")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("q.jsonl", '{"turns": ["x"]}\n{"turns"', "line 2: not valid JSON"),
        ("q.jsonl", "[1]", "line 1: found a JSON list, expected an object"),
        ("q.jsonl", '\n{"text": "x"}', "line 2: found the fields text; expected turns, prompt"),
        ("q.jsonl", '{"turns": []}', "turns: expected a list of texts"),
        ("q.jsonl", '{"turns": "x"}', "turns: expected a list of texts"),
        ("q.jsonl", '{"prompt": 5}', "line 1: prompt: expected a list of messages"),
        ("q.jsonl", '{"prompt": "\\ud800"}', "line 1: prompt: not valid Unicode"),
        ("q.jsonl", '{"prompt": ""}', "line 1: holds no text to begin with"),
        ("q.jsonl", "\n", "empty, expected prompts"),
        ("q.jsonl.gz", b"not gzip", "line 1: not valid JSON"),
        ("q.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "cannot be read (Compressed file ended"),
        ("q.txt", " \n", "empty, expected prompts"),
        ("q.txt", b"\xff\xfe", "is UTF-16, expected UTF-8"),
    ],
)
def test_bad_files(files, name, content, message):
    path = files(name, content)
    with pytest.raises(UserError) as error:
        read_prompts([path])
    assert message in str(error.value) and path in str(error.value) and "\n" not in str(error.value)


def test_evenly():
    assert evenly("abcdef", 3) == ["a", "c", "e"] and evenly("abc", 5) == ["a", "b", "c"]


def test_a_message_goes_through_the_template(pair):
    tokenizer = pair[2]
    message, text = Prompt("x = 1", "", message=True), Prompt("x = 1", "")
    plain = token_ids(text, tokenizer, None, template=True)
    assert plain == token_ids(message, tokenizer, None, template=False) == tokenizer.encode("x = 1")
    answered = token_ids(message, tokenizer, None, template=True)
    assert answered != plain and len(answered) > len(plain)
    assert token_ids(message, tokenizer, 2, template=True) == answered[:2]
