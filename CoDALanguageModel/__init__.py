"""CoDA: a masked-diffusion language model for code, as transformers classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_coda import CoDAConfig
from .decoder import Decoding, Progress
from .generation_coda import DiffusionGenerationOutput
from .generation_config_coda import DiffusionGenerationConfig
from .infilling import InfillOutput
from .modeling_coda import CoDALanguageModel, CoDAOutput
from .row import DecodingCost, DecodingStalled, Request, Row

__all__ = [
    "CoDAConfig",
    "CoDALanguageModel",
    "CoDAOutput",
    "Decoding",
    "DecodingCost",
    "DecodingStalled",
    "DiffusionGenerationConfig",
    "DiffusionGenerationOutput",
    "InfillOutput",
    "Progress",
    "Request",
    "Row",
]

AutoConfig.register(CoDAConfig.model_type, CoDAConfig)
AutoModel.register(CoDAConfig, CoDALanguageModel)
AutoModelForCausalLM.register(CoDAConfig, CoDALanguageModel)
CoDAConfig.register_for_auto_class()
CoDALanguageModel.register_for_auto_class("AutoModelForCausalLM")
