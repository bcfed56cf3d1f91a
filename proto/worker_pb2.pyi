from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerId(_message.Message):
    __slots__ = ("worker_id", "epoch")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class AttemptId(_message.Message):
    __slots__ = ("request_id", "number")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    number: int
    def __init__(self, request_id: _Optional[str] = ..., number: _Optional[int] = ...) -> None: ...

class RouterMessage(_message.Message):
    __slots__ = ("hello", "submit", "reserve", "grant", "abort", "renew", "gone", "drain", "more")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    hello: RouterHello
    submit: Submit
    reserve: Reserve
    grant: Grant
    abort: AbortAttempt
    renew: Renew
    gone: WorkerGone
    drain: Drain
    more: _containers.RepeatedCompositeFieldContainer[RouterMessage]
    def __init__(self, hello: _Optional[_Union[RouterHello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., reserve: _Optional[_Union[Reserve, _Mapping]] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ..., abort: _Optional[_Union[AbortAttempt, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ..., gone: _Optional[_Union[WorkerGone, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., more: _Optional[_Iterable[_Union[RouterMessage, _Mapping]]] = ...) -> None: ...

class RouterHello(_message.Message):
    __slots__ = ("router_id", "router_epoch", "worker_epoch")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    ROUTER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    router_epoch: int
    worker_epoch: int
    def __init__(self, router_id: _Optional[str] = ..., router_epoch: _Optional[int] = ..., worker_epoch: _Optional[int] = ...) -> None: ...

class SequenceSpec(_message.Message):
    __slots__ = ("attempt", "prompt", "output", "sampling", "priority", "age")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    AGE_FIELD_NUMBER: _ClassVar[int]
    attempt: AttemptId
    prompt: _containers.RepeatedScalarFieldContainer[int]
    output: _containers.RepeatedScalarFieldContainer[int]
    sampling: SamplingSpec
    priority: int
    age: float
    def __init__(self, attempt: _Optional[_Union[AttemptId, _Mapping]] = ..., prompt: _Optional[_Iterable[int]] = ..., output: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[SamplingSpec, _Mapping]] = ..., priority: _Optional[int] = ..., age: _Optional[float] = ...) -> None: ...

class SamplingSpec(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "seed", "sequence_index", "max_tokens", "min_tokens", "stop_token_ids", "logprobs", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "biased_tokens", "biases", "bad_words", "prompt_logprobs", "grammar")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_INDEX_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    BIASED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BIASES_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    sequence_index: int
    max_tokens: int
    min_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    biased_tokens: _containers.RepeatedScalarFieldContainer[int]
    biases: _containers.RepeatedScalarFieldContainer[float]
    bad_words: _containers.RepeatedCompositeFieldContainer[TokenSequence]
    prompt_logprobs: int
    grammar: str
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., sequence_index: _Optional[int] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[int] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., biased_tokens: _Optional[_Iterable[int]] = ..., biases: _Optional[_Iterable[float]] = ..., bad_words: _Optional[_Iterable[_Union[TokenSequence, _Mapping]]] = ..., prompt_logprobs: _Optional[int] = ..., grammar: _Optional[str] = ...) -> None: ...

class TokenSequence(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("sequence", "target")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    sequence: SequenceSpec
    target: WorkerId
    def __init__(self, sequence: _Optional[_Union[SequenceSpec, _Mapping]] = ..., target: _Optional[_Union[WorkerId, _Mapping]] = ...) -> None: ...

class Reserve(_message.Message):
    __slots__ = ("sequence", "source")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    sequence: SequenceSpec
    source: WorkerId
    def __init__(self, sequence: _Optional[_Union[SequenceSpec, _Mapping]] = ..., source: _Optional[_Union[WorkerId, _Mapping]] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("attempt", "ticket")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    attempt: AttemptId
    ticket: bytes
    def __init__(self, attempt: _Optional[_Union[AttemptId, _Mapping]] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class AbortAttempt(_message.Message):
    __slots__ = ("attempt",)
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    attempt: AttemptId
    def __init__(self, attempt: _Optional[_Union[AttemptId, _Mapping]] = ...) -> None: ...

class Renew(_message.Message):
    __slots__ = ("attempts",)
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    attempts: _containers.RepeatedCompositeFieldContainer[AttemptId]
    def __init__(self, attempts: _Optional[_Iterable[_Union[AttemptId, _Mapping]]] = ...) -> None: ...

class WorkerGone(_message.Message):
    __slots__ = ("worker",)
    WORKER_FIELD_NUMBER: _ClassVar[int]
    worker: WorkerId
    def __init__(self, worker: _Optional[_Union[WorkerId, _Mapping]] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("hello", "tokens", "granted", "adopted", "handed_over", "failed", "preempted", "more")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    ADOPTED_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    PREEMPTED_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    hello: WorkerHello
    tokens: TokenBatch
    granted: Granted
    adopted: Adopted
    handed_over: HandedOver
    failed: AttemptFailed
    preempted: PreemptedAttempt
    more: _containers.RepeatedCompositeFieldContainer[WorkerMessage]
    def __init__(self, hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., tokens: _Optional[_Union[TokenBatch, _Mapping]] = ..., granted: _Optional[_Union[Granted, _Mapping]] = ..., adopted: _Optional[_Union[Adopted, _Mapping]] = ..., handed_over: _Optional[_Union[HandedOver, _Mapping]] = ..., failed: _Optional[_Union[AttemptFailed, _Mapping]] = ..., preempted: _Optional[_Union[PreemptedAttempt, _Mapping]] = ..., more: _Optional[_Iterable[_Union[WorkerMessage, _Mapping]]] = ...) -> None: ...

class WorkerHello(_message.Message):
    __slots__ = ("worker", "role", "block_size", "total_blocks", "pid")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    worker: WorkerId
    role: str
    block_size: int
    total_blocks: int
    pid: int
    def __init__(self, worker: _Optional[_Union[WorkerId, _Mapping]] = ..., role: _Optional[str] = ..., block_size: _Optional[int] = ..., total_blocks: _Optional[int] = ..., pid: _Optional[int] = ...) -> None: ...

class TokenBatch(_message.Message):
    __slots__ = ("step", "sequences")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    step: int
    sequences: _containers.RepeatedCompositeFieldContainer[SequenceTokens]
    def __init__(self, step: _Optional[int] = ..., sequences: _Optional[_Iterable[_Union[SequenceTokens, _Mapping]]] = ...) -> None: ...

class SequenceTokens(_message.Message):
    __slots__ = ("attempt", "position", "tokens", "logprobs", "finish", "computing", "cached_tokens", "prompt_logprobs")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    COMPUTING_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    attempt: AttemptId
    position: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[SpecLogprob]
    finish: str
    computing: float
    cached_tokens: int
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[SpecLogprob]
    def __init__(self, attempt: _Optional[_Union[AttemptId, _Mapping]] = ..., position: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[SpecLogprob, _Mapping]]] = ..., finish: _Optional[str] = ..., computing: _Optional[float] = ..., cached_tokens: _Optional[int] = ..., prompt_logprobs: _Optional[_Iterable[_Union[SpecLogprob, _Mapping]]] = ...) -> None: ...

class SpecLogprob(_message.Message):
    __slots__ = ("token", "logprob", "top_tokens", "top_logprobs")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token: int
    logprob: float
    top_tokens: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token: _Optional[int] = ..., logprob: _Optional[float] = ..., top_tokens: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Granted(_message.Message):
    __slots__ = ("attempt", "ticket")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    attempt: AttemptId
    ticket: bytes
    def __init__(self, attempt: _Optional[_Union[AttemptId, _Mapping]] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class Adopted(_message.Message):
    __slots__ = ("attempt", "held_blocks")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    attempt: AttemptId
    held_blocks: int
    def __init__(self, attempt: _Optional[_Union[AttemptId, _Mapping]] = ..., held_blocks: _Optional[int] = ...) -> None: ...

class HandedOver(_message.Message):
    __slots__ = ("attempt", "bytes", "seconds", "exposed", "transport")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    attempt: AttemptId
    bytes: int
    seconds: float
    exposed: float
    transport: str
    def __init__(self, attempt: _Optional[_Union[AttemptId, _Mapping]] = ..., bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., exposed: _Optional[float] = ..., transport: _Optional[str] = ...) -> None: ...

class AttemptFailed(_message.Message):
    __slots__ = ("attempt", "reason", "retriable")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRIABLE_FIELD_NUMBER: _ClassVar[int]
    attempt: AttemptId
    reason: str
    retriable: bool
    def __init__(self, attempt: _Optional[_Union[AttemptId, _Mapping]] = ..., reason: _Optional[str] = ..., retriable: _Optional[bool] = ...) -> None: ...

class PreemptedAttempt(_message.Message):
    __slots__ = ("attempt",)
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    attempt: AttemptId
    def __init__(self, attempt: _Optional[_Union[AttemptId, _Mapping]] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("worker_epoch", "interval", "router_id")
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    worker_epoch: int
    interval: float
    router_id: str
    def __init__(self, worker_epoch: _Optional[int] = ..., interval: _Optional[float] = ..., router_id: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("step", "in_step", "predicted_step", "prefill_rate", "decode_step", "num_waiting", "num_running", "free_blocks", "total_blocks", "quarantined_blocks", "tickets", "draining", "others_assigned", "others_pending_tokens", "others_context_tokens")
    STEP_FIELD_NUMBER: _ClassVar[int]
    IN_STEP_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_STEP_FIELD_NUMBER: _ClassVar[int]
    PREFILL_RATE_FIELD_NUMBER: _ClassVar[int]
    DECODE_STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TICKETS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    OTHERS_ASSIGNED_FIELD_NUMBER: _ClassVar[int]
    OTHERS_PENDING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OTHERS_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    step: int
    in_step: bool
    predicted_step: float
    prefill_rate: float
    decode_step: float
    num_waiting: int
    num_running: int
    free_blocks: int
    total_blocks: int
    quarantined_blocks: int
    tickets: int
    draining: bool
    others_assigned: int
    others_pending_tokens: int
    others_context_tokens: int
    def __init__(self, step: _Optional[int] = ..., in_step: _Optional[bool] = ..., predicted_step: _Optional[float] = ..., prefill_rate: _Optional[float] = ..., decode_step: _Optional[float] = ..., num_waiting: _Optional[int] = ..., num_running: _Optional[int] = ..., free_blocks: _Optional[int] = ..., total_blocks: _Optional[int] = ..., quarantined_blocks: _Optional[int] = ..., tickets: _Optional[int] = ..., draining: _Optional[bool] = ..., others_assigned: _Optional[int] = ..., others_pending_tokens: _Optional[int] = ..., others_context_tokens: _Optional[int] = ...) -> None: ...

class StepsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ObservedSteps(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedCompositeFieldContainer[ObservedStep]
    def __init__(self, steps: _Optional[_Iterable[_Union[ObservedStep, _Mapping]]] = ...) -> None: ...

class ObservedStep(_message.Message):
    __slots__ = ("prefill_rows", "prefill_tokens", "prefill_pairs", "prefill_context", "decode_rows", "decode_context", "sampled", "seconds", "period")
    PREFILL_ROWS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_PAIRS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    DECODE_ROWS_FIELD_NUMBER: _ClassVar[int]
    DECODE_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    PERIOD_FIELD_NUMBER: _ClassVar[int]
    prefill_rows: int
    prefill_tokens: int
    prefill_pairs: int
    prefill_context: int
    decode_rows: int
    decode_context: int
    sampled: int
    seconds: float
    period: float
    def __init__(self, prefill_rows: _Optional[int] = ..., prefill_tokens: _Optional[int] = ..., prefill_pairs: _Optional[int] = ..., prefill_context: _Optional[int] = ..., decode_rows: _Optional[int] = ..., decode_context: _Optional[int] = ..., sampled: _Optional[int] = ..., seconds: _Optional[float] = ..., period: _Optional[float] = ...) -> None: ...

class WorkloadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ObservedWorkload(_message.Message):
    __slots__ = ("topology", "requests")
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    topology: str
    requests: _containers.RepeatedCompositeFieldContainer[ObservedRequest]
    def __init__(self, topology: _Optional[str] = ..., requests: _Optional[_Iterable[_Union[ObservedRequest, _Mapping]]] = ...) -> None: ...

class ObservedRequest(_message.Message):
    __slots__ = ("age", "input_tokens", "output_tokens", "cached_tokens", "ok", "ttft", "tpot")
    AGE_FIELD_NUMBER: _ClassVar[int]
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    TTFT_FIELD_NUMBER: _ClassVar[int]
    TPOT_FIELD_NUMBER: _ClassVar[int]
    age: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    ok: bool
    ttft: float
    tpot: float
    def __init__(self, age: _Optional[float] = ..., input_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., ok: _Optional[bool] = ..., ttft: _Optional[float] = ..., tpot: _Optional[float] = ...) -> None: ...

class Registration(_message.Message):
    __slots__ = ("worker", "role", "address", "pid", "host", "http_address", "metrics_address", "shared_address", "shared_http_address")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SHARED_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SHARED_HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    worker: WorkerId
    role: str
    address: str
    pid: int
    host: str
    http_address: str
    metrics_address: str
    shared_address: str
    shared_http_address: str
    def __init__(self, worker: _Optional[_Union[WorkerId, _Mapping]] = ..., role: _Optional[str] = ..., address: _Optional[str] = ..., pid: _Optional[int] = ..., host: _Optional[str] = ..., http_address: _Optional[str] = ..., metrics_address: _Optional[str] = ..., shared_address: _Optional[str] = ..., shared_http_address: _Optional[str] = ...) -> None: ...

class Registered(_message.Message):
    __slots__ = ("accepted", "reason")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    reason: str
    def __init__(self, accepted: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("router_id",)
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    def __init__(self, router_id: _Optional[str] = ...) -> None: ...

class Roster(_message.Message):
    __slots__ = ("workers", "dead", "routers")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    DEAD_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[Registration]
    dead: _containers.RepeatedCompositeFieldContainer[WorkerId]
    routers: _containers.RepeatedCompositeFieldContainer[Registration]
    def __init__(self, workers: _Optional[_Iterable[_Union[Registration, _Mapping]]] = ..., dead: _Optional[_Iterable[_Union[WorkerId, _Mapping]]] = ..., routers: _Optional[_Iterable[_Union[Registration, _Mapping]]] = ...) -> None: ...

class KillRequest(_message.Message):
    __slots__ = ("worker", "reason")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    worker: WorkerId
    reason: str
    def __init__(self, worker: _Optional[_Union[WorkerId, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class KillReply(_message.Message):
    __slots__ = ("dead",)
    DEAD_FIELD_NUMBER: _ClassVar[int]
    dead: bool
    def __init__(self, dead: _Optional[bool] = ...) -> None: ...

class GetClusterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClusterState(_message.Message):
    __slots__ = ("cluster", "uptime", "members")
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    cluster: str
    uptime: float
    members: _containers.RepeatedCompositeFieldContainer[Member]
    def __init__(self, cluster: _Optional[str] = ..., uptime: _Optional[float] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("registration", "state", "restarts", "last_error")
    REGISTRATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    registration: Registration
    state: str
    restarts: int
    last_error: str
    def __init__(self, registration: _Optional[_Union[Registration, _Mapping]] = ..., state: _Optional[str] = ..., restarts: _Optional[int] = ..., last_error: _Optional[str] = ...) -> None: ...

class ShutdownRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShutdownReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
