"""Tensor parallelism: one model over several processes (ranks). Rank 0 is the engine; the others do as it tells."""
