"""Models that tests share. mlx_redrafter comes first: it puts OpenBLAS in front of MLX's BLAS."""

from __future__ import annotations

import ctypes
import os
import pathlib
import sys

from support import DATA, make_model
from support.costs import made_up

import mlx_redrafter  # isort: skip

import mlx.core as mx
import pytest

from mlx_redrafter.embedded import assistant
from mlx_redrafter.embedded.corpus import held_out_prefixes
from mlx_redrafter.system import device
from mlx_redrafter.target.cache import attention
from mlx_redrafter.tuning import session

ASSISTANT_FILE = assistant.weights_file()


def pytest_collection_modifyitems(items):
    """Marks the tests that run a trained model, which `make test-fast` leaves out, and gives slow ones their time."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(1800))
        if {"pair", "stories", "stories_pair", "hub", "served", "told"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("model")


@pytest.fixture(scope="session", autouse=True)
def tuning_folder(tmp_path_factory):
    """What is measured of pairs stays out of the user's cache, and takes no two seconds a pair."""
    folder = tmp_path_factory.mktemp("tuning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_REDRAFTER_TUNING", str(folder))
        patch.setattr(mlx_redrafter.tuning.measure, "SECONDS", 0.0)
        patch.setattr(device, "load_average", lambda: 0.0)  # tests keep the cores busy themselves
        yield folder


@pytest.fixture(scope="session", autouse=True)
def no_assistant():
    """Tests run as where the assistant is not installed, so that a command without --model means the embedded pair."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assistant, "weights_file", lambda: None)
        yield


@pytest.fixture(scope="session")
def assistant_file() -> pathlib.Path:
    """The assistant's GGUF file, which a package brings."""
    if ASSISTANT_FILE is None:
        pytest.skip(f"the assistant is not installed: {assistant.INSTALL}")
    return ASSISTANT_FILE


@pytest.fixture(scope="session")
def pair():
    """The embedded (model, drafter, tokenizer) in float32."""
    return mlx_redrafter.load()


@pytest.fixture(scope="session")
def prefixes(pair) -> list[list[int]]:
    """Token ids of 30 beginnings that the embedded target never saw in training."""
    found = held_out_prefixes(30)
    assert len(found) == 30
    return [pair[2].encode(text) for text in found]


@pytest.fixture(scope="session")
def stories() -> pathlib.Path:
    """A target of another family than the embedded one: SentencePiece's manner, vocabulary 512, heads of 8."""
    return DATA / "tiny"


@pytest.fixture
def drafting_pays(tmp_path, monkeypatch):
    """Steps cost the same, whatever they draft, and whatever was measured by tests before."""
    monkeypatch.setenv("MLX_REDRAFTER_TUNING", str(tmp_path / "tuning"))
    monkeypatch.setattr(session, "measure", lambda *_: made_up(lambda rows: 1.0))
    monkeypatch.setattr(session, "_measured", {})


@pytest.fixture(scope="module")
def without_a_compiler():
    """mx.compile calls a C++ compiler for every new shape on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def in_one_piece():
    """While it lasts, a step is sent to the device as a whole, as on a GPU; mx.compile can trace it."""
    with attention.in_one_piece():
        yield


@pytest.fixture
def chains_only(monkeypatch):
    """While it lasts, rope takes one position for a whole call, as in models that read it on the host."""
    fast_rope = mx.fast.rope

    def rope(x, dims, *, offset, **options):
        if isinstance(offset, mx.array) and offset.size > 1:
            raise ValueError("one position is all that this rope takes")
        return fast_rope(x, dims, offset=offset, **options)

    monkeypatch.setattr("mlx_redrafter.target.operations._rope", rope)


@pytest.fixture
def small_model():
    """A random Llama of two layers, vocabulary 97."""
    return make_model()


@pytest.fixture(scope="session")
def stories_pair(stories):
    """(model, drafter, tokenizer) of the target that writes stories, in float32."""
    return mlx_redrafter.load(str(stories), str(DATA / "tiny-drafter"), dtype="float32")


@pytest.fixture
def without_privileges():
    """While it lasts, permissions of files hold even for root: the capabilities that override them are laid down."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    kept = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; low words, then high words
    assert libc.capget(header, kept) == 0
    less = (ctypes.c_uint32 * 6)(*kept)
    less[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, less) == 0
    yield
    assert libc.capset(header, kept) == 0


@pytest.fixture(scope="session")
def served():
    """A client of a server of the target that writes stories and its drafter."""
    from support.serving import TINY, serving

    with serving(*TINY, "--num-draft-tokens", "3") as client:
        yield client


@pytest.fixture(scope="session")
def parrot(tmp_path_factory):
    """The directory of a target whose texts are known, and of its drafter."""
    from support.parrot import make_parrot

    return make_parrot(tmp_path_factory.mktemp("parrot") / "parrot")


@pytest.fixture(scope="session")
def parrot_flags(parrot):
    return ("--model", str(parrot), "--draft", str(parrot / "drafter"), "--num-draft-tokens", "2", "--lookup", "off")


@pytest.fixture(scope="session")
def told(parrot_flags):
    """A client of a server of that target."""
    from support.serving import serving

    with serving(*parrot_flags) as client:
        yield client
