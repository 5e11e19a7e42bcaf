"""The tokenizer stage: text and chats to token ids. Never loads torch."""
