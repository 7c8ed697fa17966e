"""A model in Vicuna's shape, written once."""

import pytest
from support.vicuna import write_tokenizer, write_vicuna


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session")
def vicuna(tmp_path_factory, sentencepiece_model):
    return write_vicuna(tmp_path_factory.mktemp("vicuna") / "hf", sentencepiece_model)
