"""Chat templates for models that have none, by name (see --chat-template)."""
