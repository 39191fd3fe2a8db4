"""Pre- and mid-training of CoDA: token shards in, sharded checkpoints and safetensors out."""
