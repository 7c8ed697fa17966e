"""What the parity tests share; without torch they are skipped, each file saying so."""

import importlib.util

if importlib.util.find_spec("torch"):
    from torch_reference.cases import drafters, embedding, one_thread, targets  # noqa: F401
