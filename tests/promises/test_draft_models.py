"""A small model as drafter, of every kind of model and beside every kind: the text is the target's."""

import shutil

import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_tokenizer
from mlx_redrafter.benchmarks.architectures import small_models
from mlx_redrafter.benchmarks.architectures.check import PROMPT
from support import DATA, SHARED, make_model

from mlx_redrafter.cli.main import main
from mlx_redrafter.decoding.sampling import greedy, position_keyed
from mlx_redrafter.drafting.cached.draft_model import DraftModel
from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.errors import UserError
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.generate import stream_generate
from mlx_redrafter.text.loading import EMBEDDED, load

CHAIN, TREE = DraftShape(1, 4, 3), DraftShape(3, 4, 7)
TINYPY, TINYPY_DRAFT = SHARED / "models" / "tinypy", SHARED / "models" / "tinypy-draft"


pytestmark = pytest.mark.usefixtures("without_a_compiler")


def written(model, tokenizer, prompt, drafter, shape=TREE, count=40, **options):
    """Token ids, and the mean acceptance length."""
    responses = list(stream_generate(model, tokenizer, prompt, drafter, max_tokens=count, shape=shape, **options))
    return [r.token for r in responses][:count], responses[-1].mean_acceptance_length


def itself(module, tokenizer):
    """A target, and a drafter that is right always: the same model once more."""
    return small_models.build(module), DraftModel(small_models.build(module), tokenizer)


@pytest.mark.parametrize("module", ["llama", "gemma3_text", "qwen3_next"])
def test_the_target_itself_drafts_what_it_would_write(module, tokenizer):
    """If this fails, a model drafts behind another text than the target's: rows are missing, or out of place."""
    model, drafter = itself(module, tokenizer)
    plain, _ = written(model, tokenizer, PROMPT, None, lookup="off")
    for shape in (CHAIN, TREE):
        text, length = written(model, tokenizer, PROMPT, drafter, shape, lookup="off")
        assert text == plain and length > 3, (shape, length)


@pytest.mark.parametrize(
    ("module", "draft"), [("llama", "gemma3_text"), ("qwen3_next", "llama"), ("llama", "qwen3_next")]
)
def test_texts(module, draft, tokenizer):
    """If this fails, a draft model changes the text."""
    model = small_models.build(module)
    drafter = DraftModel(small_models.build(draft), tokenizer)
    drafter.config.scored = min(drafter.config.scored, Target.of(model).vocab_size)
    choose = position_keyed(0.8, seed=3)
    plain, _ = written(model, tokenizer, PROMPT, None, chooser=choose)
    for shape, lookup in ((TREE, "off"), (CHAIN, "on"), ("auto", "auto")):
        assert written(model, tokenizer, PROMPT, drafter, shape, chooser=choose, lookup=lookup)[0] == plain


@pytest.mark.parametrize("count", [7, 8, 9, 10])
def test_a_conversation_reads_on(tokenizer, count):
    """If this fails, a draft model forgets earlier turns, or keeps rows that were taken back."""
    model, drafter = itself("llama", tokenizer)
    cache, text = make_prompt_cache(model), []
    for turn in (PROMPT[:5], PROMPT[5:9], PROMPT[9:]):
        options = {"shape": TREE, "count": count, "prompt_cache": cache, "lookup": "off"}
        answer, length = written(model, tokenizer, turn, drafter, **options)
        plain, _ = written(model, tokenizer, [*text, *turn], None, count=count)
        assert answer == plain and length > 2
        text += [*turn, *answer]


def test_a_cache_of_somebody_else(tokenizer):
    """If this fails, a draft model reads the end of a text only, where all of it is known."""
    model, drafter = itself("llama", tokenizer)
    cache = make_prompt_cache(model)
    first, _ = written(model, tokenizer, PROMPT[:6], None, prompt_cache=cache)
    known = [*PROMPT[:6], *first]
    options = {"shape": CHAIN, "prompt_cache": cache, "lookup": "off", "cached_tokens": known}
    answer, length = written(model, tokenizer, PROMPT[6:], drafter, **options)
    assert answer == written(model, tokenizer, [*known, *PROMPT[6:]], None)[0] and length > 3


def test_long_prompts_and_plain_steps(tokenizer, monkeypatch):
    """If this fails, rows that wait for long are read wrongly, or a prompt is in pieces."""
    monkeypatch.setattr("mlx_redrafter.drafting.cached.memory.CHUNK", 5)
    monkeypatch.setattr("mlx_redrafter.drafting.cached.memory.PIECE", 3)
    model, drafter = itself("llama", tokenizer)
    prompt = (PROMPT * 4)[:43]
    plain, _ = written(model, tokenizer, prompt, None, count=60)
    for lookup in ("off", "auto"):
        assert written(model, tokenizer, prompt, drafter, "auto", 60, lookup=lookup)[0] == plain
    text, length = written(model, tokenizer, prompt, drafter, CHAIN, 60, lookup="off")
    assert text == plain and length > 3.9


def test_a_smaller_vocabulary(tokenizer):
    """If this fails, tokens that a draft model has not are read beyond its embedding, or drafted."""
    model, smaller = make_model(), DraftModel(make_model(vocab=61), tokenizer)
    plain, _ = written(model, tokenizer, PROMPT, None)
    assert max(plain) > 61
    assert written(model, tokenizer, PROMPT, smaller, lookup="off")[0] == plain
    larger = DraftModel(make_model(vocab=130), tokenizer)
    larger.fit(Target.of(model), tokenizer, "it")
    assert larger.config.scored == 97
    assert written(model, tokenizer, PROMPT, larger, lookup="off")[0] == plain


def test_tokenizers_are_compared_by_their_tokens(tokenizer):
    """If this fails, a model of another family drafts, or one of the family is refused for a few special tokens."""
    drafter = DraftModel(make_model(), load_tokenizer(DATA / "tiny"))
    with pytest.raises(UserError, match=r"it: is a model with another tokenizer than the target's: .* of its 4096"):
        drafter.fit(Target.of(make_model()), tokenizer, "it")
    other = load_tokenizer(EMBEDDED / "target")
    other.add_tokens(["<extra>", "<more>"])
    for mine, theirs in ((tokenizer, other), (other, tokenizer)):
        DraftModel(make_model(), mine).fit(Target.of(make_model()), theirs, "it")


def test_the_command(stories, tmp_path, capsys):
    """If this fails, `--draft MODEL` is refused, or its figures say that something else drafted."""
    small = shutil.copytree(stories, tmp_path / "small")
    flags = ["--model", str(stories), "--dtype", "float32", "-p", "Once upon a time", "-m", "30", "--json"]
    texts = [(main(["generate", *flags, *more]), capsys.readouterr().out) for more in ([], ["--draft", str(small)])]
    assert [code for code, _ in texts] == [0, 0]
    assert '"draft model"' in texts[1][1]


@pytest.mark.skipif(not TINYPY.exists(), reason="tinypy and tinypy-draft are not beside the project")
def test_tinypy():
    """If this fails, a trained pair writes another text than its target, or the draft model is of no use."""
    model, drafter, tokenizer = load(str(TINYPY), str(TINYPY_DRAFT), dtype="float32")
    prompt = "import os\n\n\ndef read_lines(path):\n    with open(path"
    for choose in (greedy, position_keyed(0.7, seed=1)):
        plain, _ = written(model, tokenizer, prompt, None, count=32, chooser=choose)
        text, length = written(model, tokenizer, prompt, drafter, TREE, 32, chooser=choose, lookup="off")
        assert text == plain and length > 1.3
