"""The engine: scheduling, KV cache, models, sampling. The only stage that loads torch."""
