"""The training loop and what it is made of: start, batches, one step, update rules, validation."""
