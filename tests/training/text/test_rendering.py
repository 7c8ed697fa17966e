"""Which tokens of a conversation are to be learned, under templates of several kinds."""

import numpy as np
import pytest
from support.templates import CHATML, renderer_of

from mlx_redrafter import UserError
from mlx_redrafter.training.text.file_rows import cut_rows
from mlx_redrafter.training.text.formats import Document, document

INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Like templates of reasoning models: thoughts stay in the last answer only.
THOUGHTS = CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'].split('</think>')[-1] }}",
)
# The number of messages stands at the top, so no beginning renders as the beginning of the whole.
COUNTED = "{{ messages|length }}\n" + CHATML
MARKED = COUNTED.replace(
    "{{ m['content'] }}<|im_end|>",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}",
)
TALK = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "<think>hm</think>Because."},
    {"role": "user", "content": "Really?"},
    {"role": "assistant", "content": "<think>oh</think>Yes, really."},
]
ANSWERS = ["<think>hm</think>Because.<|im_end|>", "<think>oh</think>Yes, really.<|im_end|>"]


def learned(renderer, marked):
    """The runs of tokens that are to be learned, as text with special tokens."""
    ids, counts = marked
    edges = np.flatnonzero(np.diff(np.concatenate([[0], counts, [0]])))
    return [renderer._tokenizer.decode(ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def test_answers_are_learned_with_their_ends():
    """If this fails, a drafter learns what the user says, or what the template puts around answers."""
    renderer = renderer_of(CHATML)
    (whole,) = renderer.conversation([*TALK, {"role": "user", "content": "left over"}], "here")
    assert learned(renderer, whole) == [
        "<think>hm</think>Because.<|im_end|>",
        "<think>oh</think>Yes, really.<|im_end|>",
    ]
    assert renderer.encode(renderer._render(TALK, "here"), special=False) == whole[0]


def test_tokens_across_the_border():
    """If this fails, an answer loses its first token where the template has no token of its own before it."""
    renderer = renderer_of(INST)
    (whole,) = renderer.conversation(TALK[:2], "here")
    assert learned(renderer, whole) == [" <think>hm</think>Because.<|endoftext|>"]
    renderer = renderer_of("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    messages = [{"role": "user", "content": "x ="}, {"role": "assistant", "content": "    1"}]
    (whole,) = renderer.conversation(messages, "here")
    assert learned(renderer, whole)[0].strip() == "1"


def test_thoughts_that_later_turns_leave_out():
    renderer = renderer_of(THOUGHTS)
    first, second = renderer.conversation(TALK, "here")
    assert learned(renderer, first) == ["<think>hm</think>Because.<|im_end|>"]
    assert learned(renderer, second) == ["<think>oh</think>Yes, really.<|im_end|>"]
    assert "hm" not in renderer._tokenizer.decode(second[0])


def test_marks_of_the_templates_own():
    renderer = renderer_of(MARKED)
    (whole,) = renderer.conversation(TALK, "here")
    assert learned(renderer, whole) == [
        "<think>hm</think>Because.<|im_end|>",
        "<think>oh</think>Yes, really.<|im_end|>",
    ]


@pytest.mark.parametrize("template", [CHATML, INST, THOUGHTS, MARKED])
def test_answers_of_weight_0(template):
    """If this fails, a drafter learns the answers that a data set marks as not to be learned."""
    renderer, first, last = renderer_of(template), [dict(m) for m in TALK], [dict(m) for m in TALK]
    first[3]["weight"], last[1]["weight"] = 0, 0
    assert renderer.conversation([m | {"weight": 0} for m in TALK], "here") == []
    for talk, answer, other in ((first, "Because.", "Yes, really."), (last, "Yes, really.", "Because.")):
        [text] = [text for marked in renderer.conversation(talk, "here") for text in learned(renderer, marked)]
        assert answer in text and other not in text


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (COUNTED, TALK, "here: the chat template renders a conversation otherwise than its beginning"),
        (None, TALK, "here: is a conversation, but the target has no chat template"),
        (CHATML, TALK[:1], "here: no message has the role assistant"),
        (
            "{{ raise_exception('roles must alternate') }}",
            TALK,
            "here: the tokenizer's chat template: roles must alternate",
        ),
    ],
)
def test_what_cannot_be_rendered(template, messages, message):
    with pytest.raises(UserError, match=message):
        renderer_of(template).conversation(messages, "here")


def test_plain_text_is_learned_and_joined():
    """If this fails, texts run into each other without an end between them."""
    renderer = renderer_of(None)
    end = next(iter(renderer.ends))
    a, b = renderer.encode("import os\nimport sys\n"), renderer.encode("x = 1\n")
    documents = [Document("a", "import os\nimport sys\n"), Document("b", "x = 1\n")]
    rows, facts = cut_rows(renderer, documents, 5)
    assert [t for ids, _ in rows for t in ids] == [*a, end, *b, end]
    counts = np.concatenate([marks for _, marks in rows])
    assert np.flatnonzero(~counts).tolist() == [0, len(a) + 1] and facts["documents"] == 2
    assert all(len(ids) == 5 for ids, _ in rows[:-1])
    piece = renderer.text(Document("a", "x = 1\n", is_start=False, is_end=False))
    assert piece[0] == b


def test_completions():
    document = Document("here", "2\n", prompt="1 + 1 = ")
    renderer = renderer_of(None)
    ((row, counts),), _ = cut_rows(renderer, [document], 40)
    assert renderer.decode(row) == "1 + 1 = 2\n" and learned(renderer, (row, counts)) == ["2\n<|endoftext|>"]
    renderer = renderer_of(CHATML)
    ((row, counts),), _ = cut_rows(renderer, [document], 40)
    assert learned(renderer, (row, counts)) == ["2\n<|im_end|>"]
    assert "<|im_start|>user\n1 + 1 = <|im_end|>" in renderer._tokenizer.decode(row)


def test_instructions_without_a_template():
    """If this fails, an answer follows its instruction without a line between."""
    found = document({"instruction": "Add.", "input": "1 + 1", "output": "2"}, "here")
    ((row, counts),), _ = cut_rows(renderer_of(None), [found], 40)
    assert renderer_of(None).decode(row) == "Add.\n\n1 + 1\n\n2"
    assert learned(renderer_of(None), (row, counts)) == ["2<|endoftext|>"]


def test_conversations_that_do_not_fit():
    renderer = renderer_of(CHATML)
    (whole,) = renderer.conversation(TALK, "here")
    answer = int(np.argmax(whole[1]))
    rows, facts = cut_rows(renderer, [Document("here", messages=TALK)], answer + 2)
    assert rows[0][0] == whole[0][: answer + 2] and facts["tokens_cut"] == len(whole[0]) - answer - 2
    assert cut_rows(renderer, [Document("here", messages=TALK)], answer) == (
        [],
        {"documents": 1, "left_out": 1, "tokens_cut": len(whole[0]) - answer},
    )


def test_where_the_user_begins_and_ends():
    """If this fails, a chat model asked for a question is not asked in its template's words."""
    renderer = renderer_of(CHATML, ends=("<|im_end|>",))
    decode = renderer._tokenizer.decode
    assert decode(renderer.opening()) == "<|im_start|>user\n"
    assert renderer.users_turn(renderer.encode(" Why is an assistant blue?\n<|im_end|>")) == "Why is an assistant blue?"
    other = renderer_of(CHATML.replace("<|im_end|>", "<|im_end|>", 1), ends=("<|endoftext|>",))
    assert {decode([token]) for token in other.turn_ends()} == {"<|endoftext|>", "<|im_end|>"}
    plain = renderer_of(INST)
    assert decode(plain.opening()) == "<|endoftext|>[INST] "
    assert plain.users_turn(plain.encode(" Why? [/INST] Because.")) == "Why?"
    assert renderer_of("{% for m in messages %}{{ m['content'] }}\n{% endfor %}").opening() == []


def test_fingerprint_changes_with_the_template():
    assert renderer_of(CHATML).fingerprint() == renderer_of(CHATML).fingerprint() != renderer_of(THOUGHTS).fingerprint()
