"""Supervised fine-tuning of CoDA through LLaMA-Factory: its data, model loading and trainer, our objective.

Run it with `python -m coda_posttrain`. Not here: the noise process and the loss themselves
(`CoDALanguageModel.diffusion`), preference and reward stages.
"""
