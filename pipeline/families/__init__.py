"""Model families: how each writes tool calls and reasoning. Data and small parsers; see `table`."""
