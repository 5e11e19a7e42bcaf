"""The pooling half of the engine: inputs in, vectors or class scores out, in batches, with no state between them."""
