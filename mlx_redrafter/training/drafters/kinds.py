"""Lists the kinds of drafters that can be trained, by the value of --method.

Knows nothing of how they are trained.
"""

from __future__ import annotations

from mlx_redrafter.training.drafters.base import Method
from mlx_redrafter.training.drafters.draft_model import DraftModel
from mlx_redrafter.training.drafters.eagle import Eagle
from mlx_redrafter.training.drafters.medusa import Medusa
from mlx_redrafter.training.drafters.redrafter import ReDrafter

METHODS: dict[str, Method] = {method.name: method for method in (ReDrafter(), Medusa(), Eagle(), DraftModel())}
