"""The detokenizer stage: token ids to text, stop strings, logprob texts."""
