"""OpenAI-compatible HTTP server for CoDA models.

HTTP (`app`, `protocol`, `responses`, `streaming`), text (`answers`), the queue and its one
worker thread (`scheduler`, `engine`) and the model (`sampler`) are separate modules; only `sampler` knows
tensors. Not here: the denoising loop, which is `CoDALanguageModel.diffusion_generate`.
"""
