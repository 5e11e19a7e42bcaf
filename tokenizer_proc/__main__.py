"""`python -m tokenizer_proc --config FILE --index N --epoch E`: the tokenizer process."""
from __future__ import annotations

import sys

from pipeline.messages import Kind
from pipeline.stage import Context, run
from tokenizer_proc.worker import TextModels, TokenizerWorker


def build(context: Context) -> TokenizerWorker:
    """The first model's tokenizer is loaded before the stage is ready, the others at first use."""
    context.progress("loading the tokenizer", 0)
    models = TextModels(context.config)
    models.get(0)
    return TokenizerWorker(context.config, context.index, context.epoch, context.sender, context.registry, models)


if __name__ == "__main__":
    sys.exit(run(Kind.TOKENIZER, build))
