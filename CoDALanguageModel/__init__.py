"""CoDA: a masked-diffusion language model for code, as transformers classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_coda import CoDAConfig
from .generation_coda import DiffusionGenerationConfig, DiffusionGenerationOutput
from .modeling_coda import CoDALanguageModel, CoDAOutput

__all__ = ["CoDAConfig", "CoDALanguageModel", "CoDAOutput", "DiffusionGenerationConfig", "DiffusionGenerationOutput"]

AutoConfig.register(CoDAConfig.model_type, CoDAConfig)
AutoModel.register(CoDAConfig, CoDALanguageModel)
AutoModelForCausalLM.register(CoDAConfig, CoDALanguageModel)
CoDAConfig.register_for_auto_class()
CoDALanguageModel.register_for_auto_class("AutoModelForCausalLM")
