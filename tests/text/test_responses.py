"""What a response says of its drafts: by lookup where that pays or was asked for, never another text."""

import json

import pytest

from mlx_redrafter import Conversation, DraftShape, UserError, stream_generate
from mlx_redrafter.cli.main import main
from mlx_redrafter.drafting.lookup import LookupProposer
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.text.responses import drafted
from mlx_redrafter.tuning.acceptance_model import LOOKUP_ASSUMED
from mlx_redrafter.tuning.session import session_for

IMPORTS = "import os\nimport sys\n" * 12
TREE = DraftShape(4, 5, 7)


def test_auto_says_what_it_did(pair, prefixes):
    """If this fails, a user cannot tell what was chosen, or the text is another one."""
    model, drafter, tokenizer = pair

    def stream(*args, **options):
        return list(stream_generate(model, tokenizer, prefixes[3], *args, max_tokens=48, **options))

    expected = [response.token for response in stream()]
    found = stream(drafter)
    assert [response.token for response in found] == expected
    last = found[-1]
    assert last.method == "redrafter" and 0 <= last.plain_share <= 1
    assert (last.shape is None) == (last.plain_share + last.lookup_share == 1)
    fixed = stream(drafter, shape=TREE)
    assert [response.token for response in fixed] == expected
    assert fixed[-1].shape == TREE and fixed[-1].plain_share == 0


def test_lookup_is_on_where_the_shape_is_chosen(pair):
    """If this fails, a user has to know of lookup to have it; or it comes where a shape was asked for."""
    model, drafter, tokenizer = pair
    known = session_for(verifier_of(model), drafter).memory.lookup
    before = [known.expected(kind) for kind in range(len(LOOKUP_ASSUMED))]
    *_, last = stream_generate(model, tokenizer, IMPORTS, drafter, max_tokens=64)
    # How many steps look up depends on what they cost here. What lookups would bring is remembered in any case.
    assert (last.lookup_share > 0) == ("by lookup" in drafted(last))
    assert [known.expected(kind) for kind in range(len(LOOKUP_ASSUMED))] != before
    *_, last = stream_generate(model, tokenizer, IMPORTS, drafter, max_tokens=64, shape=DraftShape())
    assert last.lookup_share == 0 and drafted(last) == "by the drafter (mostly chain of 3)"
    *_, last = stream_generate(model, tokenizer, IMPORTS, None, max_tokens=64, lookup="on")
    assert (last.lookup_share, last.shape, drafted(last)) == (1, None, "by lookup")
    *_, last = stream_generate(model, tokenizer, IMPORTS, None, max_tokens=64)
    assert last.method == "plain"


def test_a_fixed_shape_with_lookup(pair):
    """If this fails, lookup beside a shape that was asked for drafts another shape, or another text."""
    model, drafter, tokenizer = pair
    texts = set()
    for shape in (DraftShape(), TREE):
        for lookup in ("off", "auto", "on"):
            found = list(stream_generate(model, tokenizer, IMPORTS, drafter, max_tokens=40, shape=shape, lookup=lookup))
            texts.add(tuple(response.token for response in found))
            assert found[-1].shape in (shape, None) and found[-1].plain_share == 0
            assert lookup != "on" or (found[-1].shape, found[-1].lookup_share) == (shape, 0)
    assert len(texts) == 1


def test_earlier_turns_are_looked_at(pair):
    """If this fails, a conversation looks only at its last message."""
    model, _, tokenizer = pair
    function = "def total(items):\n    result = 0\n    for item in items:\n        result += item.price * item.count\n"
    seen = []
    begin = LookupProposer.begin

    def spy(self, text, root, contexts):
        begin(self, text, root, contexts)
        seen.append(list(self.index.tokens))

    conversation = Conversation(model, tokenizer, None, max_tokens=8, lookup="on")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LookupProposer, "begin", spy)
        for _ in range(2):
            *_, last = conversation.ask(function)
    assert last.method == "lookup" and last.prompt_tokens < len(seen[1]) - 20
    assert seen[1][: len(seen[0])] == seen[0]


def test_from_the_shell(capsys):
    """If this fails, --lookup does nothing, or is not refused where it is wrong."""
    prompt = "import os\nimport os\nimport os\nimport"
    texts = {}
    for flags in ("--draft none", "--draft none --lookup on", "--lookup auto", "--lookup on --beam-width 4"):
        assert main(["generate", "-p", prompt, "-m", "24", "--json", *flags.split()]) == 0
        found = json.loads(capsys.readouterr().out)
        texts[flags] = found["tokens"]
        assert found["method"] == {"--draft none": "plain", "--draft none --lookup on": "lookup"}.get(
            flags, "redrafter"
        )
    assert len({tuple(tokens) for tokens in texts.values()}) == 1
    with pytest.raises(SystemExit):
        main(["generate", "-p", "x", "--lookup", "maybe"])


def test_a_wrong_word_for_lookup(pair):
    model, drafter, tokenizer = pair
    with pytest.raises(UserError, match="lookup is 'maybe', expected one of auto, on, off"):
        next(stream_generate(model, tokenizer, "x", drafter, lookup="maybe"))
