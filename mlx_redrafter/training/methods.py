"""The kinds of drafters that can be trained, by the value of --method."""

from __future__ import annotations

from .medusa import Medusa
from .method import Method
from .redrafter import ReDrafter

METHODS: dict[str, Method] = {method.name: method for method in (ReDrafter(), Medusa())}
