"""Text in, token shards out, and the order in which a run reads them. `python -m coda_pretrain data`."""
