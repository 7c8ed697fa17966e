"""ReDrafter on MLX: the same text from a language model, in fewer steps of it."""

from mlx_redrafter.system.openblas import prefer_openblas

prefer_openblas()  # has to come before anything that imports mlx

from mlx_redrafter.drafting.redrafter import DrafterConfig, RecurrentDrafter  # noqa: E402
from mlx_redrafter.drafting.shape import DraftShape  # noqa: E402
from mlx_redrafter.errors import UserError  # noqa: E402
from mlx_redrafter.text.batches.generate import BatchResponse, batch_generate  # noqa: E402
from mlx_redrafter.text.conversation import Conversation  # noqa: E402
from mlx_redrafter.text.generate import generate, stream_generate  # noqa: E402
from mlx_redrafter.text.loading import load  # noqa: E402
from mlx_redrafter.text.responses import GenerationResponse  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "BatchResponse",
    "Conversation",
    "DraftShape",
    "DrafterConfig",
    "GenerationResponse",
    "RecurrentDrafter",
    "UserError",
    "batch_generate",
    "generate",
    "load",
    "stream_generate",
]
