"""Exit codes of `quartet` and of the stages, with the sentence that documents each."""
from __future__ import annotations

OK = 0
CONFIG = 2
MODEL_LOAD = 3
MEMORY = 4
CRASH_LOOP = 5
PORT_IN_USE = 6

MEANING = {
    OK: "clean stop",
    CONFIG: "the command line, configuration file or environment is wrong",
    MODEL_LOAD: "a model or its tokenizer could not be loaded",
    MEMORY: "there is not enough memory for the weights or the KV cache",
    CRASH_LOOP: "a stage died five times within 60 seconds",
    PORT_IN_USE: "the port or socket is already in use",
}
