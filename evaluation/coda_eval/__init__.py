"""Benchmarks for CoDA: lm-eval with our model, our tasks and a sandbox for what the model writes."""
