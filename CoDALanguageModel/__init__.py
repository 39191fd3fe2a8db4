"""CoDA: a masked-diffusion language model for code, as transformers classes.

The names below load torch and transformers when they are first asked for: settings and errors need neither.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .canvas_view import CanvasStep, CanvasStreamer
    from .configuration_coda import CoDAConfig
    from .cost import DecodingCost
    from .decoder import Decoding, Progress
    from .generation_coda import DiffusionGenerationOutput
    from .generation_config_coda import DiffusionGenerationConfig
    from .infilling import InfillOutput
    from .modeling_coda import CoDALanguageModel, CoDAOutput
    from .row import DecodingStalled, Evidence, Request, Row

__all__ = [
    "CanvasStep",
    "CanvasStreamer",
    "CoDAConfig",
    "CoDALanguageModel",
    "CoDAOutput",
    "Decoding",
    "DecodingCost",
    "DecodingStalled",
    "DiffusionGenerationConfig",
    "DiffusionGenerationOutput",
    "Evidence",
    "InfillOutput",
    "Progress",
    "Request",
    "Row",
    "UserError",
]
_MODULES = {
    "CanvasStep": "canvas_view",
    "CanvasStreamer": "canvas_view",
    "CoDAConfig": "configuration_coda",
    "CoDALanguageModel": "modeling_coda",
    "CoDAOutput": "modeling_coda",
    "Decoding": "decoder",
    "DecodingCost": "cost",
    "DecodingStalled": "row",
    "DiffusionGenerationConfig": "generation_config_coda",
    "DiffusionGenerationOutput": "generation_coda",
    "Evidence": "row",
    "InfillOutput": "infilling",
    "Progress": "decoder",
    "Request": "row",
    "Row": "row",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
