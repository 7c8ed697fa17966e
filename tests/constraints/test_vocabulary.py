"""Every token means the bytes that it adds to a text, for tokenizers of both manners."""

from unittest.mock import create_autospec

import pytest
import transformers
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.constraints.vocabulary import vocabulary
from mlx_redrafter.errors import UserError


@pytest.fixture(params=["pair", "stories_pair"])
def tokenizer(request):
    return request.getfixturevalue(request.param)[2]


def test_tokens_are_their_bytes(tokenizer):
    """If this fails, grammars see other text than the reader."""
    found = vocabulary(tokenizer, len(tokenizer.get_vocab()))
    for text in ('{"name": "Tim and Sue", "n": [1, 2]}', "a  b\n\tc", "Tim said: hello!"):
        assert found.decode_bytes(tokenizer.encode(f"x{text}", add_special_tokens=False)).strip() == f"x{text}".encode()


def test_ends_are_no_text(tokenizer):
    """If this fails, a text can end, or not end, where a grammar says otherwise."""
    found = vocabulary(tokenizer, len(tokenizer.get_vocab()))
    assert set(found.eos_tokens) == set(tokenizer.eos_token_ids)
    assert all(found.is_special_token(end) for end in tokenizer.eos_token_ids)


def test_it_is_made_once_and_again_for_other_ends(tokenizer):
    """If this fails, every text waits for the vocabulary, or a new ending token is not known."""
    size = len(tokenizer.get_vocab())
    assert vocabulary(tokenizer, size) is vocabulary(tokenizer, size)
    assert vocabulary(tokenizer, size + 64).vocab_size == size + 64


def test_a_slow_tokenizer_is_refused():
    """If this fails, a tokenizer without a fast form ends in a traceback."""

    inner = create_autospec(transformers.PreTrainedTokenizer, instance=True)
    slow = create_autospec(TokenizerWrapper, instance=True, _tokenizer=inner, eos_token_ids={0}, backend_tokenizer=None)
    with pytest.raises(UserError, match="tokenizer is no fast one"):
        vocabulary(slow, 1)
