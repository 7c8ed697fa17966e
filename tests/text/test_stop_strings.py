"""Stop strings: found wherever tokens are cut, never given out, nothing after them kept."""

import itertools
import json

import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_redrafter import generate, stream_generate
from mlx_redrafter.cli.main import main
from mlx_redrafter.decoding.sampling import position_keyed
from mlx_redrafter.text.stop_strings import StopStrings

PROMPT = "import os\n\n\ndef read_lines(path):\n"


@pytest.mark.parametrize("text", ["abcSTOPdef", "aSSTOP", "STOP", "no such thing", "STO", "SSTSTOSTOP", ""])
@pytest.mark.parametrize("stops", [["STOP"], ["STOP", "OPd"], [""], []])
def test_any_cut(text, stops):
    """If this fails, a stop string that falls across tokens is missed, or half of it is printed."""
    places = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    expected = text[: min(places)] if places else text
    for size in (1, 2, 3, 50):
        found, given, stopped = StopStrings(stops), "", False
        pieces = [text[i : i + size] for i in range(0, len(text), size)] or [""]
        for i, piece in enumerate(pieces):
            out, stopped = found.take(piece, last=i + 1 == len(pieces))
            given += out
            assert expected.startswith(given)
            if stopped:
                break
        if "OPd" not in stops:  # of two that overlap, the one that is whole first wins
            assert given == expected
        assert stopped == bool(places)


def test_text_that_cannot_become_a_stop_is_not_held_back():
    stops = StopStrings(["\n\n"])
    assert stops.take("ab\n") == ("ab", False)
    assert stops.take("c") == ("\nc", False)


@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_generation_stops(pair, temp):
    """If this fails, text goes on after a stop string, or the cache holds what comes after it."""
    model, drafter, tokenizer = pair
    options = {"max_tokens": 60, "chooser": position_keyed(temp, 2)}
    whole = generate(model, tokenizer, PROMPT, drafter=drafter, **options)
    for begin, size in itertools.product((5, 20, 41), (1, 4, 9)):
        stop = whole[begin : begin + size]
        for used in (None, drafter):
            cache = make_prompt_cache(model)
            found = list(stream_generate(model, tokenizer, PROMPT, used, stop=[stop], prompt_cache=cache, **options))
            assert "".join(r.text for r in found) == whole[: whole.find(stop)]
            assert found[-1].finish_reason == "stop"
            assert cache[0].offset == found[-1].prompt_tokens + len(found)


def test_flags(capsys, pair):
    model, drafter, tokenizer = pair
    whole = generate(model, tokenizer, PROMPT, drafter=drafter, max_tokens=40)
    stop = whole[30:37]
    assert main(["generate", "-p", PROMPT, "-m", "40", "--stop", "nothing like it", stop]) == 0
    assert capsys.readouterr().out.split("\n==========")[0] == whole.partition(stop)[0]
    # A word that is one token and first comes late in the text.
    words = [r.text for r in stream_generate(model, tokenizer, PROMPT, drafter, max_tokens=40)]
    word = next(w for w in words[15:] if w.isidentifier() and len(tokenizer.encode(w, add_special_tokens=False)) == 1)
    [end] = tokenizer.encode(word, add_special_tokens=False)
    assert main(["generate", "-p", PROMPT, "-m", "40", "--extra-eos-token", word, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["finish_reason"] == "stop" and report["tokens"].count(end) == 1 and report["tokens"][-1] == end
    assert main(["generate", "-p", PROMPT, "--extra-eos-token", "no such token at all"]) == 2
    assert "--extra-eos-token no such token at all" in capsys.readouterr().err
