"""`python -m tokenizer_proc --config FILE --index N --epoch E`: the tokenizer process."""
from __future__ import annotations

import importlib.util
import logging
import sys

from pipeline.errors import StartError
from pipeline.exits import CONFIG
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
    worker = TokenizerWorker(context.config, context.index, context.epoch, context.sender, context.registry, models)
    if any(model.task == "transcribe" for model in context.config.models):
        if any(importlib.util.find_spec(name) is None for name in ("av", "librosa", "soundfile", "soxr")):
            raise StartError(CONFIG, "Speech models need more packages: pip install 'quartet-serve[audio]'.")
        worker.recordings.warm_up()
    return worker


if __name__ == "__main__":
    sys.exit(run(Kind.TOKENIZER, build))
