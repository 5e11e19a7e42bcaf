"""`python -m detok_proc --config FILE --index N --epoch E`: the detokenizer process."""
from __future__ import annotations

import os
import sys

from detok_proc.worker import DetokWorker, Vocabs
from pipeline.messages import Kind
from pipeline.stage import Context, run


def build(context: Context) -> DetokWorker:
    """The first model's vocabulary is loaded before the stage is ready, the others at first use."""
    context.progress("loading the tokenizer", 0)
    vocabs = Vocabs(context.config)
    vocabs.get(0)
    return DetokWorker(context.config, context.index, context.epoch, context.sender, context.registry, vocabs)


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.exit(run(Kind.DETOKENIZER, build))
