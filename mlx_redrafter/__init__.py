"""ReDrafter on MLX: the same text from a language model, in fewer steps of it."""

from .blas import prefer_openblas

prefer_openblas()  # has to come before anything that imports mlx

from .conversation import Conversation  # noqa: E402
from .drafter import DrafterConfig, RecurrentDrafter  # noqa: E402
from .errors import UserError  # noqa: E402
from .generate import generate, stream_generate  # noqa: E402
from .loading import load  # noqa: E402
from .responses import GenerationResponse  # noqa: E402
from .settings import DraftShape  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "Conversation",
    "DraftShape",
    "DrafterConfig",
    "GenerationResponse",
    "RecurrentDrafter",
    "UserError",
    "generate",
    "load",
    "stream_generate",
]
