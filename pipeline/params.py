"""What a request asks of the engine and of the detokenizer: wire records with resolved values, no defaults to guess.

The frontend fills them (request over the model's generation defaults over the table's defaults); the tokenizer and the
engine check again what only they can know (vocabulary size, context length).
"""
from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.schema import i64, u8, u32, u64

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_BIAS = 1024
MAX_STOP_IDS = 256
MAX_BAD_WORDS = 128              # and id sequences that they become
MAX_BAD_WORD_CHARS = 256
MAX_LOGPROB_IDS = 128
MAX_PATTERN = 1024               # ids of a pattern that repetition_detection looks for
MAX_BEAMS = 64
MAX_LOGPROB_CELLS = 2**21        # log-probabilities of one answer, where more than MAX_LOGPROBS per token are asked for
GREEDY_BELOW = 1e-5


@dataclass(slots=True)
class Grammar:
    """What constrains a choice's output; checked by the tokenizer, compiled by the engine beside its loop."""

    kind: str                           # pipeline.grammars.KINDS; from the tokenizer to the engine: COMPILED
    text: str                           # the schema, pattern, JSON list of choices, grammar or tag description
    after: str = ""                     # the text that ends what comes before the constraint (a reasoning's end tag)
    after_ids: bytes = b""              # uint32: the same as ids, filled in by the tokenizer; empty: from the first id
    whitespace: str | None = None       # JSON: regex of white space between tokens; "": none; None: a little
    closed: bool = False                # JSON: objects have no properties but those that the schema names
    param: str = "response_format"      # the parameter that asked for it, for errors
    open: bool = False                  # JSON: objects that do not say so may have more properties; else where schemas combine


@dataclass(slots=True)
class Thinking:
    """A bound on the ids between a model's reasoning tags; then the end tag is forced."""

    budget: u32                         # ids of reasoning
    start: str                          # the tags' texts
    end: str
    implied: bool = False               # an answer begins inside, where the prompt has no tag
    start_id: i64 = -1                  # the same as ids, filled in by the tokenizer
    end_id: i64 = -1


@dataclass(slots=True)
class Repetition:
    """A choice ends once a pattern of min_size to max_size ids stands min_count times in a row at its end."""

    max_size: u32
    min_size: u32
    min_count: u32


@dataclass(slots=True)
class Beam:
    """Beam search instead of sampling: choice j is the j-th best of the `width` hypotheses."""

    width: u8
    length_penalty: float = 1.0         # a hypothesis counts its log-probability divided by its length to this power
    early: str = "false"                # when to stop, as in transformers' early_stopping: false | true | never


@dataclass(slots=True)
class SamplingParams:
    """How the engine samples one choice. Random numbers are keyed by (seed, choice, position)."""

    temperature: float = 1.0            # < GREEDY_BELOW: greedy
    top_p: float = 1.0                  # (0, 1]
    top_k: i64 = 0                      # 0: off
    min_p: float = 0.0                  # [0, 1]
    seed: u64 = 0                       # fixed by the frontend at admission
    max_tokens: u32 = 16                # the engine cuts it to the context; 0 only with echo: nothing is generated
    min_tokens: u32 = 0                 # no end-of-sequence and no stop id before this many
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0     # over prompt and output
    ignore_eos: bool = False
    stop_ids: bytes = b""               # uint32: the request's stop_token_ids and the model's secondary end ids
    bias_ids: bytes = b""               # uint32
    bias_values: bytes = b""            # float32, as many as bias_ids
    logprobs: i64 | None = None         # None: off; k: the sampled token and the k best
    prompt_logprobs: i64 | None = None  # None: off; k: each prompt token and the k best
    grammar: Grammar | None = None
    allowed_ids: bytes = b""            # uint32: nothing else is sampled; empty: everything may be
    bad_words: list[str] = field(default_factory=list)
    bad_ids: list[bytes] = field(default_factory=list)      # uint32 each: `bad_words`, filled in by the tokenizer
    logprob_ids: bytes = b""            # uint32: with each token, besides the k best, the log-probabilities of these
    repetition: Repetition | None = None
    thinking: Thinking | None = None
    beam: Beam | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


@dataclass(slots=True)
class DetokSpec:
    """How the detokenizer turns one choice's ids into text."""

    model: u8 = 0                       # index into ServerConfig.models: whose tokenizer
    stop: list[str] = None              # type: ignore[assignment]  # stop strings, none of them empty
    include_stop: bool = False          # keep the stop string in the text
    min_tokens: u32 = 0                 # no stop string is looked for before this many output tokens
    skip_special: bool = True
    spaces_between_special: bool = True
    echo: bool = False                  # send the prompt's text (and its logprobs' texts) ahead of the first delta
    tool_parser: str = ""               # of families.table.FAMILIES; "": calls are not looked for
    reasoning_parser: str = ""          # of families.reasoning.REASONINGS; "": reasoning is not taken out
    signatures: bytes = b""             # JSON: function -> parameter -> types, of the request's tools
    max_calls: u32 = 0                  # the choice ends after so many calls; 0: no limit
    echo_special: bool = False          # with its special tokens, whatever `skip_special` says of the output

    def __post_init__(self) -> None:
        if self.stop is None:
            self.stop = []


@dataclass(slots=True)
class PoolParams:
    """What a request asks of a model that gives vectors instead of text."""

    task: str                           # embed | classify | score | token_embed | token_classify
    activation: bool | None = None      # normalise embeddings, squash scores; None: what the model's files say
    dimensions: u32 = 0                 # 0: all; else the first so many, normalised again


@dataclass(slots=True)
class SpeechParams:
    """What a request asks of a speech model."""

    task: str                           # transcribe | translate
    language: str | None                # ISO code of what is spoken; None: the model tells
    prompt: str                         # text that is taken to have been said before
    hotwords: str                       # words that are likely to come
    timestamps: bool                    # segments with times
    words: bool                         # times of words, too
    temperatures: list[float]           # tried in this order until an answer passes the thresholds
    sampling: SamplingParams            # the rest of how tokens are chosen; max_tokens 0: what the decoder allows
