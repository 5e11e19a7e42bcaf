"""The speech half of the engine: windows of audio in, timed segments of text out; many windows are decoded at once."""
