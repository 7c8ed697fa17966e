"""Converted tokenizers give the ids that can be told by hand from the tokens, and SentencePiece's own."""

from __future__ import annotations

import io
import json

import gguf
import pytest
import sentencepiece
from mlx_lm.utils import load_tokenizer
from support import gguf_files

from mlx_redrafter.errors import UserError
from mlx_redrafter.gguf.file import read_gguf
from mlx_redrafter.gguf.splitting import PATTERNS
from mlx_redrafter.gguf.tokenizer import end_tokens, write_tokenizer

LINES = [
    "the sea and the sky",
    "hello there, hello world",
    "12 34 56 7 890",
    "a\tb\nc",
    "naïve café",
    "to be or not to be",
]


def make(tmp_path, keys, arch="llama"):
    """(tokenizer as mlx-lm loads it, the file's own reading, what was written to generation_config.json)."""
    writer = gguf.GGUFWriter(tmp_path / "tokens.gguf", arch)
    for key, value in keys.items():
        gguf_files.add_key(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    file = read_gguf(tmp_path / "tokens.gguf")
    folder = tmp_path / "out"
    folder.mkdir()
    fields = {"max_position_embeddings": 64, "eos_token_id": end_tokens(file)}
    write_tokenizer(file, fields, folder)
    (folder / "config.json").write_text(json.dumps(fields | {"model_type": "llama"}))
    return load_tokenizer(folder, eos_token_ids=fields["eos_token_id"]), folder


def bytes_keys(pre, **more):
    tokens, types, merges = gguf_files.bytes_tokens()
    more = {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<|begin|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|end|>"),
    } | more


def spelled(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize(
    "pre, text, expected",
    [
        ("gpt-2", "hello hello", ["hello", "Ġhello"]),
        ("gpt-2", "  hello", ["Ġ", "Ġhello"]),
        ("gpt-2", "a   ", ["a", "ĠĠ", "Ġ"]),
        ("gpt-2", "1212", ["12", "12"]),
        ("smollm", "1212", ["1", "2", "1", "2"]),
        ("smollm", "hello 12", ["hello", "Ġ", "1", "2"]),
        ("qwen2", "1212", ["1", "2", "1", "2"]),
        ("llama-bpe", "1212", ["12", "1", "2"]),  # 121 and 2
        ("llama-bpe", "a\n\n", ["a", "ĊĊ"]),
        ("gpt-2", "a\n\nb", ["a", "Ċ", "Ċ", "b"]),
        ("llama-bpe", "a\n\nb", ["a", "ĊĊ", "b"]),
        ("gpt-2", "é😀", ["Ã", "©", "ð", "Ł", "ĺ", "Ģ"]),
        ("gpt-2", "a<|end|>hello", ["a", "<|end|>", "hello"]),
        ("gpt-2", "a <think> hello", ["a", "Ġ", "<think>", "Ġhello"]),
        ("gpt-2", "<|end|", ["<", "|", "e", "n", "d", "|"]),
        ("gpt-2", "[PAD310]", ["[", "P", "A", "D", "3", "1", "0", "]"]),
    ],
)
def test_byte_pairs_by_hand(tmp_path, pre, text, expected):
    tokenizer, _ = make(tmp_path, bytes_keys(pre))
    assert spelled(tokenizer, text) == expected
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_words_that_are_tokens_go_before_merges(tmp_path):
    keys = bytes_keys("llama-bpe", merges=["h e", "l l"])  # none makes hello any more
    assert spelled(make(tmp_path, keys)[0], "hello") == ["hello"]


def test_all_patterns_split_all_text(tmp_path):
    text = "Hello, WORLD! I'm 12345 years\told…\n\n  naïve 😀 日本語 can't\r\n/path/to x+=1 "
    for i, pre in enumerate(PATTERNS):
        (tmp_path / str(i)).mkdir()
        tokenizer, _ = make(tmp_path / str(i), bytes_keys(pre))
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text, pre


@pytest.mark.parametrize(
    "pre, more, first",
    [
        ("gpt-2", {}, []),
        ("gpt-2", {"add_bos_token": True}, ["<|begin|>"]),
        ("llama-bpe", {}, ["<|begin|>"]),
        ("llama-bpe", {"add_bos_token": False}, []),
    ],
)
def test_first_token(tmp_path, pre, more, first):
    tokenizer, _ = make(tmp_path, bytes_keys(pre, **more))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("hello")) == [*first, "hello"]


def test_end_tokens_and_template_come_along(tmp_path):
    tokens, *_ = gguf_files.bytes_tokens()
    eom = tokens.index("<|eom_id|>")
    keys = bytes_keys("gpt-2", eot_token_id=tokens.index("hello"))
    tokenizer, folder = make(tmp_path, keys | {"tokenizer.chat_template": gguf_files.TEMPLATE})
    ends = [tokens.index("<|end|>"), tokens.index("hello"), tokens.index("<|eot_id|>"), eom]
    written = json.loads((folder / "generation_config.json").read_text())
    assert written["eos_token_id"] == ends and tokenizer.eos_token_ids == set(ends)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|begin|>hi"


def test_phi3_takes_the_spaces_behind_special_tokens(tmp_path):
    for i, (name, expected) in enumerate([("Phi-3 mini", ["<|end|>", "hello"]), ("other", ["<|end|>", "Ċ", "hello"])]):
        (tmp_path / str(i)).mkdir()
        tokenizer, _ = make(tmp_path / str(i), bytes_keys("gpt-2") | {"general.name": name})
        assert spelled(tokenizer, "<|end|>\nhello") == expected


@pytest.fixture(scope="module")
def pieces():
    """SentencePiece models, with a space in front of texts and without one."""
    made = {}
    for spaced in (True, False):
        stream = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES * 20),
            model_writer=stream,
            model_type="bpe",
            vocab_size=340,
            byte_fallback=True,
            add_dummy_prefix=spaced,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            user_defined_symbols=["<turn>"] if spaced else ["<turn>", "▁▁"],  # Gemma's kind has tokens of spaces
            minloglevel=2,
        )
        made[spaced] = sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())
    return made


def pieces_keys(processor, spaced):
    """llama.cpp's keys of a SentencePiece model, as its converter writes them."""
    tokens, types = [], []
    for i in range(processor.get_piece_size()):
        piece = processor.id_to_piece(i)
        kind = 2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
        if piece in ("<turn>", "▁▁"):
            kind, piece = 4, piece.replace("▁", " ")
        tokens.append(piece)
        types.append(kind)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [processor.get_score(i) for i in range(len(tokens))],
        "tokenizer.ggml.add_space_prefix": None if spaced else False,
    }


@pytest.mark.parametrize("spaced", [True, False])
def test_pieces_as_sentencepiece_has_them(tmp_path, pieces, spaced):
    processor = pieces[spaced]
    tokenizer, _ = make(tmp_path, pieces_keys(processor, spaced))
    texts = [
        *LINES,
        "the hello sea\nand 1234567",
        "😀 日本",
        " lead",
        "x = y",
        "hellothesea",
        "",
        "tab\there",
        "a  b   c",
    ]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == [processor.bos_id(), *processor.encode(text)], text
        assert tokenizer.decode(ids[1:]) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_space_goes_before_each_text_between_special_tokens(tmp_path, pieces):
    tokenizer, _ = make(tmp_path, pieces_keys(pieces[True], True))
    ids = tokenizer.encode("hello</s>hello<turn>hello", add_special_tokens=False)
    hello = pieces[True].encode("hello")
    assert ids == [*hello, 2, *hello, pieces[True].piece_to_id("<turn>"), *hello]


def test_streaming_gives_the_whole_text(tmp_path, pieces):
    tokenizer, _ = make(tmp_path, pieces_keys(pieces[True], True))
    text = "hello there, 😀 world"
    detokenizer = tokenizer.detokenizer
    for token in tokenizer.encode(text)[1:]:
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == text


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert', expected gpt2 or llama"),
        ({"tokenizer.ggml.pre": "unheard-of"}, "tokenizer.ggml.pre is 'unheard-of', expected one of default"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "1 different tokens, expected 2"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "2 token types, expected 320"),
        ({"tokenizer.ggml.merges": None}, "key 'tokenizer.ggml.merges' is missing"),
        ({"tokenizer.ggml.tokens": None}, "key 'tokenizer.ggml.tokens' is missing"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "tokenizer.ggml.eos_token_id is 'x', expected int"),
        ({"tokenizer.chat_template": 7}, "tokenizer.chat_template is 7, expected str"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, keys, message):
    with pytest.raises(UserError, match=message) as caught:
        make(tmp_path, bytes_keys("gpt-2") | keys)
    assert "tokens.gguf: " in str(caught.value) and "\n" not in str(caught.value)
