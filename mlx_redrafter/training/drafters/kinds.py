"""The kinds of drafters that can be trained, by the value of --method."""

from __future__ import annotations

from mlx_redrafter.training.drafters.base import Method
from mlx_redrafter.training.drafters.medusa import Medusa
from mlx_redrafter.training.drafters.redrafter import ReDrafter

METHODS: dict[str, Method] = {method.name: method for method in (ReDrafter(), Medusa())}
