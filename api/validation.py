"""What a client asked for becomes a submission, or an error that names the field and the limit.

Both faces share it, and nothing is given to the router before it has passed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from ..core.errors import DeadlineExceeded, InvalidRequest, ModelNotFound
from ..core.request import SamplingParams
from ..core.slo import Slo
from ..router.stream import Submission
from .model_info import ModelInfo

_T = TypeVar("_T")

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 256  # characters
MAX_TEMPERATURE = 2.0
MAX_STOP_TOKENS = 128
MAX_PENALTY = 2.0  # of presence and frequency, as OpenAI has it
MIN_REPETITION, MAX_REPETITION = 0.01, 100.0
MAX_BIAS = 100.0
MAX_BIASED_TOKENS = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_LENGTH = 128  # characters
MAX_PRIORITY = 1000
MAX_MESSAGES = 4096
MAX_REQUEST_BYTES = 16 << 20  # on the wire; a million token ids are 7 MB of JSON
MAX_NAME_LENGTH = 256  # characters of what a client calls itself and its requests
MAX_SHOWN = 80  # characters of a client's value in a message


@dataclass(frozen=True, slots=True)
class Parameters:
    """A request as a face understood it; None where the client said nothing.

    default_max_tokens  what None for `max_tokens` means before it is clipped to the model's limit; None: up to the limit
    bad_words           the token sequences of all words, see `api.bad_words`
    n, best_of          sequences to return, and to sample: those of the highest log probability per token are returned
    include_stop        the text ends with the stop string that was met, not before it
    prompt_only         the client wants to know of the prompt only: one token is sampled, and not returned
    prompt_field, max_tokens_field, tenant_field   how the client spells them, for messages
    timeout             seconds that the client is willing to wait
    grammar             what the output must match (llguidance), checked before; grammar_field is what asked for it
    kept_tokens         special tokens whose text belongs to the answer
    """

    prompt: tuple[int, ...]
    prompt_field: str = "prompt"
    max_tokens: int | None = None
    default_max_tokens: int | None = None
    max_tokens_field: str = "max_tokens"
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    prompt_logprobs: int | None = None
    include_stop: bool = False
    prompt_only: bool = False
    n: int = 1
    best_of: int | None = None
    client_id: str = ""
    tenant: str = ""
    tenant_field: str = "tenant"
    priority: int = 0
    slo: Slo | None = None
    timeout: float | None = None
    grammar: str | None = None
    grammar_field: str = ""
    kept_tokens: frozenset[str] = frozenset()


def check_model(name: str, model: ModelInfo) -> None:
    """Raises ModelNotFound unless `name` is empty or the served model's."""
    if name and name != model.name:
        raise ModelNotFound(f"the model {shown(name)} is not served here: this is {model.name!r}")


def check_length(least: int, model: ModelInfo, field: str) -> None:
    """Raises InvalidRequest when a prompt of `least` tokens or more is too long: before any of them is made."""
    if least >= model.max_model_len:
        raise InvalidRequest(
            f"{field}: {least} or more tokens leave no room to answer within the model's limit of {model.max_model_len} tokens",
            field,
        )


def shown(value: object) -> str:
    """A client's value for a message: short, printable."""
    return repr(shortened(value)) if isinstance(value, str) else shortened(repr(value))


def shortened(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def to_submission(parameters: Parameters, model: ModelInfo, capacity: int | None) -> Submission:
    """Check everything. `capacity` is how many tokens the KV pools can hold of one sequence, None when unknown.

    Raises InvalidRequest, or DeadlineExceeded for a deadline that has passed.
    """
    _check_prompt(parameters.prompt, parameters.prompt_field, model)
    max_tokens = _max_tokens(parameters, model, capacity)
    _check_sampling(parameters, model, max_tokens)
    _check_stops(parameters.stop)
    _check_dealing(parameters)
    _check_grammar(parameters, model)
    num_sampled = _or(parameters.best_of, parameters.n)
    sampling = SamplingParams(
        temperature=_or(parameters.temperature, model.temperature),
        top_k=_or(parameters.top_k, model.top_k),
        top_p=_or(parameters.top_p, model.top_p),
        max_tokens=max_tokens,
        min_tokens=parameters.min_tokens,
        stop_token_ids=_stop_tokens(parameters, model),
        logprobs=0 if parameters.logprobs is None and num_sampled > parameters.n else parameters.logprobs,
        min_p=_or(parameters.min_p, model.min_p),
        presence_penalty=parameters.presence_penalty,
        frequency_penalty=parameters.frequency_penalty,
        repetition_penalty=_or(parameters.repetition_penalty, model.repetition_penalty),
        logit_bias=tuple(sorted(parameters.logit_bias)),
        bad_words=parameters.bad_words,
        prompt_logprobs=parameters.prompt_logprobs,
        grammar=parameters.grammar,
    )
    return Submission(
        prompt=parameters.prompt,
        sampling=sampling,
        seed=parameters.seed,
        n=num_sampled,
        client_id=parameters.client_id,
        tenant=parameters.tenant,
        priority=parameters.priority,
        slo=parameters.slo,
        timeout=parameters.timeout,
    )


def _stop_tokens(parameters: Parameters, model: ModelInfo) -> tuple[int, ...]:
    """The end of a structured output is its EOS token, which nobody can wish away."""
    eos = () if parameters.ignore_eos and parameters.grammar is None else model.eos_token_ids
    return tuple(dict.fromkeys((*eos, *parameters.stop_token_ids)))


def _check_prompt(prompt: tuple[int, ...], field: str, model: ModelInfo) -> None:
    if not prompt:
        raise InvalidRequest(f"{field}: it must hold at least one token", field)
    if len(prompt) >= model.max_model_len:
        raise InvalidRequest(
            f"{field}: {len(prompt)} tokens leave no room to answer within the model's limit of {model.max_model_len} tokens",
            field,
        )
    foreign = next((token for token in prompt if not 0 <= token < model.vocab_size), None)
    if foreign is not None:
        message = f"{field}: token {shown(foreign)} is outside the vocabulary of {model.vocab_size} tokens"
        raise InvalidRequest(message, field)


def _max_tokens(parameters: Parameters, model: ModelInfo, capacity: int | None) -> int:
    """Tokens to sample at most; prompt and output together must fit the model and the KV pools."""
    limit, what = model.max_model_len, f"the model's limit of {model.max_model_len} tokens"
    if capacity is not None and capacity < limit:
        limit, what = capacity, f"the {capacity} tokens that a worker's KV pool can hold"
    prompt = len(parameters.prompt)
    if prompt >= limit:
        own = parameters.prompt_field
        raise InvalidRequest(f"{own}: {prompt} tokens leave no room to answer within {what}", own)
    if parameters.max_tokens is None:
        return min(_or(parameters.default_max_tokens, limit), limit - prompt)
    field = parameters.max_tokens_field
    if parameters.max_tokens < 1:
        raise InvalidRequest(f"{field}: it must be at least 1, not {shown(parameters.max_tokens)}", field)
    if prompt + parameters.max_tokens > limit:
        raise InvalidRequest(
            f"{field}: {prompt} prompt tokens and {shown(parameters.max_tokens)} {field} exceed {what}; "
            f"at most {limit - prompt} can be asked for",
            field,
        )
    return parameters.max_tokens


def _check_sampling(parameters: Parameters, model: ModelInfo, max_tokens: int) -> None:
    _in_range("temperature", parameters.temperature, 0.0, MAX_TEMPERATURE)
    _in_range("top_p", parameters.top_p, 0.0, 1.0)
    if parameters.top_p == 0.0:
        raise InvalidRequest("top_p: it must be more than 0", "top_p")
    _in_range("top_k", parameters.top_k, 0, (1 << 31) - 1)
    _in_range("seed", parameters.seed, 0, (1 << 63) - 1)
    _in_range("min_tokens", parameters.min_tokens, 0, max_tokens)
    _in_range("logprobs", parameters.logprobs, 0, MAX_LOGPROBS)
    _in_range("prompt_logprobs", parameters.prompt_logprobs, 0, MAX_LOGPROBS)
    _in_range("n", parameters.n, 1, MAX_N)
    _in_range("best_of", parameters.best_of, parameters.n, MAX_N)
    _check_shaping(parameters, model)
    count = len(parameters.stop_token_ids)
    if count > MAX_STOP_TOKENS:
        raise InvalidRequest(f"stop_token_ids: at most {MAX_STOP_TOKENS} are allowed, not {count}", "stop_token_ids")
    for token in parameters.stop_token_ids:
        _in_range("stop_token_ids", token, 0, model.vocab_size - 1)


def _check_shaping(parameters: Parameters, model: ModelInfo) -> None:
    """What changes logits."""
    _in_range("min_p", parameters.min_p, 0.0, 1.0)
    _in_range("presence_penalty", parameters.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _in_range("frequency_penalty", parameters.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    _in_range("repetition_penalty", parameters.repetition_penalty, MIN_REPETITION, MAX_REPETITION)
    if len(parameters.logit_bias) > MAX_BIASED_TOKENS:
        count = len(parameters.logit_bias)
        raise InvalidRequest(f"logit_bias: at most {MAX_BIASED_TOKENS} tokens are allowed, not {count}", "logit_bias")
    for token, bias in parameters.logit_bias:
        if not 0 <= token < model.vocab_size:
            message = f"logit_bias: token {shown(token)} is outside the vocabulary of {model.vocab_size} tokens"
            raise InvalidRequest(message, "logit_bias")
        _in_range("logit_bias", bias, -MAX_BIAS, MAX_BIAS)


def _check_stops(stops: tuple[str, ...]) -> None:
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop: at most {MAX_STOPS} stop strings are allowed, not {len(stops)}", "stop")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_LENGTH:
            raise InvalidRequest(f"stop: a stop string has 1 to {MAX_STOP_LENGTH} characters, not {len(stop)}", "stop")


def _check_grammar(parameters: Parameters, model: ModelInfo) -> None:
    if parameters.grammar is None:
        return
    if parameters.min_tokens:
        message = f"min_tokens: {parameters.grammar_field} decides where the output ends; leave it out, or ask for 0"
        raise InvalidRequest(message, "min_tokens")
    if not model.eos_token_ids:
        field = parameters.grammar_field
        raise InvalidRequest(f"{field}: this model's config names no eos_token_id, by which structured output ends", field)


def _check_dealing(parameters: Parameters) -> None:
    _in_range("priority", parameters.priority, -MAX_PRIORITY, MAX_PRIORITY)
    for field, name in (("request_id", parameters.client_id), (parameters.tenant_field, parameters.tenant)):
        if len(name) > MAX_NAME_LENGTH:
            raise InvalidRequest(f"{field}: at most {MAX_NAME_LENGTH} characters are allowed, not {len(name)}", field)
    slo = parameters.slo
    if slo is not None and not (slo.ttft > 0 and slo.tpot > 0):
        raise InvalidRequest(f"slo: objectives are more than 0 seconds, not ttft {slo.ttft} and tpot {slo.tpot}", "slo")
    if parameters.timeout is not None and parameters.timeout <= 0:
        raise DeadlineExceeded("the deadline had passed before the request arrived")


def _in_range(field: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:  # also when it is NaN
        raise InvalidRequest(f"{field}: it must be from {low} to {high}, not {shown(value)}", field)


def _or(value: _T | None, default: _T) -> _T:
    return default if value is None else value
