"""OpenAI-compatible HTTP server for CoDA models.

HTTP (`app`, `protocol`, `responses`, `streaming`), the queue and its one worker thread (`scheduler`, `engine`) and the
model (`sampler`) are separate modules; only `sampler` knows tensors. Not here: text (`prompts` and `answers` of the
model room) and the decoding loop (`CoDALanguageModel.Decoding`).
"""
