"""The tokenizer of a GGUF file, as tokenizer.json and its settings, giving the ids that llama.cpp gives."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.gguf.file import GGUF
from mlx_redrafter.gguf.splitting import BEGINNING, PATTERNS, WHOLE_WORDS

KEY = "tokenizer.ggml"
SPACE = "▁"
# What llama.cpp takes for the end of an answer by its text alone, where no key tells.
END_TEXTS = {
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
}
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_PIECED_IDS = {"bos": 1, "eos": 2, "unk": 0}  # SentencePiece's, where no key tells


def write_tokenizer(file: GGUF, config: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json.

    Args:
        config: the model's; it is given the ids of the special tokens.

    Raises:
        UserError: a tokenizer of another kind than BPE and SentencePiece, or one that is damaged.
    """
    tokens, types = _tokens(file)
    kind = file.get(f"{KEY}.model", str)
    builders = {"gpt2": _bytes_tokenizer, "llama": _sentencepiece_tokenizer}
    if kind not in builders:
        raise UserError(f"{file.path}: {KEY}.model is {kind!r}, expected {' or '.join(builders)}")
    try:
        tokenizer = builders[kind](file, tokens, types)
        _add_tokens(file, tokenizer, tokens, types)
        special = {role: i for role in _ROLES if (i := special_id(file, role)) is not None}
        _add_ends(file, tokenizer, tokens, special)
        tokenizer.save(str(folder / "tokenizer.json"))
    except UserError:
        raise
    except Exception as error:  # whatever the tokenizers library makes of tokens and merges
        raise UserError(f"{file.path}: no tokenizer can be made of it: {one_line(error)}") from error
    config |= {f"{role}_token_id": i for role, i in special.items() if role in ("bos", "pad")}
    settings: dict[str, Any] = {f"{role}_token": tokens[i] for role, i in special.items()}
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    if template := file.get("tokenizer.chat_template", str, ""):
        settings["chat_template"] = template
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    for name, fields in (("tokenizer_config.json", settings), ("generation_config.json", ends)):
        (folder / name).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", "utf-8")


def end_tokens(file: GGUF) -> list[int]:
    """The ids of all tokens that end an answer, the usual one first."""
    tokens, types = _tokens(file)
    ends = [special_id(file, role) for role in ("eos", "eot", "eom")]
    special = (TokenType.CONTROL, TokenType.USER_DEFINED)
    ends += [i for i, (text, kind) in enumerate(zip(tokens, types)) if text in END_TEXTS and kind in special]
    return list(dict.fromkeys(i for i in ends if i is not None))


def special_id(file: GGUF, role: str) -> int | None:
    """The id of a special token; None where the file has none."""
    usual = _PIECED_IDS.get(role, -1) if file.get(f"{KEY}.model", str) == "llama" else -1
    i = file.get(f"{KEY}.{_ROLES.get(role, role)}_token_id", int, usual)
    return i if 0 <= i < len(file.metadata[f"{KEY}.tokens"]) else None


def _tokens(file: GGUF) -> tuple[list[str], list[int]]:
    """All tokens and their types. Raises UserError where they do not fit each other."""
    tokens = file.get(f"{KEY}.tokens", list)
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]  # llama.cpp's name for them
    types = file.get(f"{KEY}.token_type", list, [int(TokenType.NORMAL)] * len(tokens))
    if len(types) != len(tokens):
        raise UserError(f"{file.path}: {len(types)} token types, expected {len(tokens)}, one for each token")
    if len(set(tokens)) != len(tokens):
        raise UserError(f"{file.path}: {len(set(tokens))} different tokens, expected {len(tokens)}")
    return tokens, types


def _vocabulary(tokens: list[str], types: list[int]) -> dict[str, int]:
    """Token -> id, without the unused ones at the end, which only fill up the embedding."""
    count = len(tokens)
    while count and types[count - 1] == TokenType.UNUSED:
        count -= 1
    return {token: i for i, token in enumerate(tokens[:count])}


def _bytes_tokenizer(file: GGUF, tokens: list[str], types: list[int]) -> Tokenizer:
    """Byte pairs as in GPT-2: text is split, then each byte is a letter, then letters are merged."""
    pre = file.get(f"{KEY}.pre", str, "default")
    if pre not in PATTERNS:
        raise UserError(f"{file.path}: {KEY}.pre is {pre!r}, expected one of {', '.join(PATTERNS)}")
    vocabulary = _vocabulary(tokens, types)
    merges = [_pair(line) for line in file.get(f"{KEY}.merges", list)]
    known = [pair for pair in merges if {*pair, "".join(pair)} <= vocabulary.keys()]
    tokenizer = Tokenizer(models.BPE(vocabulary, known, ignore_merges=pre in WHOLE_WORDS))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[pre]]
    as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, as_letters])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pair(line: str) -> tuple[str, str]:
    at = line.find(" ", 1)
    return line[:at], line[at + 1 :]


def _sentencepiece_tokenizer(file: GGUF, tokens: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece's byte pairs, which have a score for each piece and no list of merges."""
    vocabulary = _vocabulary(tokens, types)
    scores = file.get(f"{KEY}.scores", list, [0.0] * len(tokens))
    if len(scores) != len(tokens):
        raise UserError(f"{file.path}: {len(scores)} scores, expected {len(tokens)}, one for each token")
    mergeable = [token for token, i in vocabulary.items() if types[i] == TokenType.NORMAL]
    merges = [
        (-scores[vocabulary[piece]], vocabulary[piece[:at]], vocabulary[piece[at:]], piece[:at], piece[at:])
        for piece in mergeable
        for at in range(1, len(piece))
        if piece[:at] in vocabulary and piece[at:] in vocabulary
    ]
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    unknown = special_id(file, "unk")
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            pairs,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback="<0x0A>" in vocabulary,
        )
    )
    spaced = file.get(f"{KEY}.add_space_prefix", bool, True)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    replace = normalizers.Replace(" ", SPACE)
    # Prepend works on each stretch of text between special tokens, as llama.cpp does; Metaspace only on the first.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if spaced else replace
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if spaced else steps)
    return tokenizer


def _add_tokens(file: GGUF, tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Marks the tokens that are found in text before anything else is done to it."""
    # llama.cpp's rule, and Phi-3's own: its special tokens take the spaces and newlines behind them.
    name = file.get("general.name", str, "").lower()
    takes_spaces = "phi-3" in name or "phi3" in name
    plain = ("<unk>", "<s>", "<|endoftext|>")
    added = []
    for token, kind in zip(tokens, types):
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN):
            strip = takes_spaces and token not in plain
            special = kind != TokenType.USER_DEFINED
            added.append(AddedToken(token, normalized=False, special=special, rstrip=strip))
    tokenizer.add_tokens(added)


def _add_ends(file: GGUF, tokenizer: Tokenizer, tokens: list[str], special: dict[str, int]) -> None:
    """Has texts begin with bos and end with eos where the file says so, or llama.cpp does without being told."""
    pieced = file.get(f"{KEY}.model", str) == "llama"
    usual = pieced or file.get(f"{KEY}.pre", str, "default") in BEGINNING
    before = ["bos"] if file.get(f"{KEY}.add_bos_token", bool, usual) and "bos" in special else []
    after = ["eos"] if file.get(f"{KEY}.add_eos_token", bool, False) and "eos" in special else []
    if before or after:
        names = {role: tokens[special[role]] for role in before + after}
        first, last = ([names[role] for role in roles] for roles in (before, after))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *first, "$B", *last],
            special_tokens=[(names[role], special[role]) for role in names],
        )
