"""Recordings: a worker process that decodes them, and the tokenizer's side of it."""
