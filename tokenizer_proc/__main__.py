"""`python -m tokenizer_proc --config FILE --index N --epoch E`: the tokenizer process."""
from __future__ import annotations

import logging
import sys

from pipeline.errors import StartError
from pipeline.messages import Kind
from pipeline.stage import Context, run
from tokenizer_proc.worker import TextModels, TokenizerWorker

log = logging.getLogger(__name__)


def build(context: Context) -> TokenizerWorker:
    """Every model's tokenizer is loaded before the stage is ready, lest the first use of one holds up the others.

    One that cannot be loaded is remembered, and fails its own requests, unless it is the only one.
    """
    models = TextModels(context.config)
    for number, model in enumerate(context.config.models):
        context.progress(f"loading the tokenizer of {model.names[0]}", 100 * number // len(context.config.models))
        try:
            models.get(number)
        except StartError as error:
            if len(context.config.models) == 1:
                raise
            log.error("%s", error.message)
    return TokenizerWorker(context.config, context.index, context.epoch, context.sender, context.registry, models)


if __name__ == "__main__":
    sys.exit(run(Kind.TOKENIZER, build))
