"""What placement knows of a model: the sizes that memory, KV and arithmetic follow from. Never reads a weight.

From a model folder's config.json, or by name from a catalogue of well-known models (numbers of their public config.json).
Norms and biases are left out: they are below a thousandth of the parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from ..core.errors import InvalidRequest
from ..engine.model_config import ModelConfig, load_config

WEIGHT_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "float8_e4m3fn": 1.0,
    "fp8": 1.0,
    "int8": 1.0,
    "int4": 0.5,
}
"""Bytes of one weight (or of one number of KV) by dtype."""


@dataclass(frozen=True, slots=True)
class Linear:
    """`count` products of one rank in one layer: [tokens, inputs] times [inputs, outputs]."""

    inputs: int
    outputs: int
    count: int = 1


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder-only transformer.

    intermediate_size  inner size of an MLP; of one expert where MLPs are routed
    gated              MLPs have three matrices instead of two
    num_experts, experts_per_token   of a routed MLP; 0 when all are plain
    dense_layers       layers of a routed model that keep a plain MLP, of inner size `dense_size`
    position_embeddings  rows of learned positions; 0 with rotary ones
    """

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    gated: bool = True
    tied_embeddings: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    dense_layers: int = 0
    dense_size: int = 0
    position_embeddings: int = 0

    # ---- parameters ----------------------------------------------------------------------------

    @property
    def attention_params(self) -> int:
        """Weights of one layer's attention."""
        return 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)

    @property
    def mlp_params(self) -> int:
        """Weights of one plain MLP, or of one expert."""
        return (3 if self.gated else 2) * self.hidden_size * self.intermediate_size

    @property
    def num_params(self) -> int:
        """All parameters, embeddings included."""
        return self.layers_params + self.embedding_params

    @property
    def active_params(self) -> int:
        """Weights that one token is multiplied with; embeddings, which are looked up, are none of them."""
        return self._layers_params(self.experts_per_token) + self.vocab_size * self.hidden_size

    @property
    def layers_params(self) -> int:
        """Parameters of all layers."""
        return self._layers_params(self.num_experts)

    @property
    def embedding_params(self) -> int:
        """Parameters outside the layers: embeddings, the head where it is separate, learned positions."""
        tables = self.vocab_size * (1 if self.tied_embeddings else 2) + self.position_embeddings
        return tables * self.hidden_size

    # ---- work and memory -----------------------------------------------------------------------

    @property
    def flops_per_token(self) -> int:
        """Of the products with weights; attention comes on top (`flops_per_pair`)."""
        return 2 * self.active_params

    @property
    def flops_per_pair(self) -> int:
        """Of attention for one pair of a fed and an attended token, all layers: scores and weighted sum."""
        return 4 * self.num_layers * self.num_heads * self.head_dim

    def kv_bytes_per_token(self, dtype: str = "bfloat16") -> float:
        """Keys and values of one token in all layers and heads."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_of(dtype)

    def weight_bytes(self, dtype: str = "bfloat16") -> float:
        """All weights."""
        return self.num_params * bytes_of(dtype)

    def rank_weight_bytes(self, tensor_parallel: int, pipeline_parallel: int, dtype: str = "bfloat16") -> float:
        """Weights of the fullest rank: an even share of its stage, which may hold embedding tables besides its layers."""
        stage = -(-self.num_layers // pipeline_parallel) / self.num_layers * self.layers_params
        tables = self.embedding_params if pipeline_parallel == 1 else self.vocab_size * self.hidden_size
        return (stage + tables) / tensor_parallel * bytes_of(dtype)

    def rank_kv_bytes_per_token(self, tensor_parallel: int, pipeline_parallel: int, dtype: str = "bfloat16") -> float:
        """KV of one token on the fullest rank. Ranks beyond the KV heads hold copies of them."""
        layers = -(-self.num_layers // pipeline_parallel)
        return 2 * layers * self.rank_kv_heads(tensor_parallel) * self.head_dim * bytes_of(dtype)

    # ---- parallelism ---------------------------------------------------------------------------

    def rank_kv_heads(self, tensor_parallel: int) -> int:
        """KV heads of each rank."""
        return max(1, self.num_kv_heads // tensor_parallel)

    def linears(self, tensor_parallel: int = 1) -> tuple[Linear, ...]:
        """The products of one rank in one layer with a plain MLP; of a routed one, those of one expert come last, two of them."""
        width = self.num_heads * self.head_dim // tensor_parallel
        inner = self.intermediate_size // tensor_parallel
        qkv = width + 2 * self.rank_kv_heads(tensor_parallel) * self.head_dim
        return (
            Linear(self.hidden_size, qkv),
            Linear(width, self.hidden_size),
            Linear(self.hidden_size, (2 if self.gated else 1) * inner),
            Linear(inner, self.hidden_size),
        )

    def check_parallel(self, tensor_parallel: int, pipeline_parallel: int) -> None:
        """Raise InvalidRequest, naming the field, unless the model can be split so."""
        if tensor_parallel not in self.tensor_degrees(tensor_parallel):
            raise InvalidRequest(
                f"tensor_parallel is {tensor_parallel}; {self.name} ({self.num_heads} heads, {self.num_kv_heads} KV heads) "
                f"can be split over {', '.join(map(str, self.tensor_degrees(self.num_heads)))} ranks",
                "tensor_parallel",
            )
        if not 1 <= pipeline_parallel <= self.num_layers:
            raise InvalidRequest(
                f"pipeline_parallel is {pipeline_parallel}; {self.name} has {self.num_layers} layers: 1 to so many stages",
                "pipeline_parallel",
            )

    def tensor_degrees(self, most: int) -> tuple[int, ...]:
        """Tensor parallelisms up to `most` that split heads, KV heads (or copies of them) and MLPs evenly."""
        return tuple(
            degree
            for degree in range(1, most + 1)
            if self.num_heads % degree == 0
            and (self.num_kv_heads % degree == 0 or degree % self.num_kv_heads == 0)
            and self.intermediate_size % degree == 0
        )

    def pipeline_degrees(self, most: int) -> tuple[int, ...]:
        """Pipeline parallelisms up to `most` that split the layers evenly."""
        return tuple(degree for degree in range(1, most + 1) if self.num_layers % degree == 0)

    # ---- identity ------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Of the sizes, whatever the name: models with equal ones take equal time."""
        sizes = {key: value for key, value in asdict(self).items() if key not in ("name", "max_model_len")}
        return sha256(repr(sorted(sizes.items())).encode()).hexdigest()[:16]

    def _layers_params(self, experts: int) -> int:
        """With `experts` experts of each routed MLP."""
        routed = self.num_layers - self.dense_layers if self.num_experts else 0
        plain = self.num_layers - routed
        dense = (3 if self.gated else 2) * self.hidden_size * (self.dense_size or self.intermediate_size)
        router = self.num_experts * self.hidden_size
        return self.num_layers * self.attention_params + plain * dense + routed * (experts * self.mlp_params + router)


def bytes_of(dtype: str) -> float:
    """Bytes of one number. Raises InvalidRequest naming the dtypes there are."""
    if dtype not in WEIGHT_BYTES:
        raise InvalidRequest(f"dtype {dtype!r} is not known; use one of {', '.join(WEIGHT_BYTES)}", "dtype")
    return WEIGHT_BYTES[dtype]


def find_model(name_or_folder: str) -> ModelShape:
    """A model folder's shape, or that of a well-known model by its name or hub id.

    Raises ModelError for a folder that cannot be read, InvalidRequest (naming what is known) when it is neither.
    """
    folder = Path(name_or_folder).expanduser()
    if name_or_folder and folder.is_dir():
        return shape_of_folder(folder)
    key = _key(name_or_folder)
    for shape in MODELS.values():
        if key == _key(shape.name):
            return shape
    raise InvalidRequest(
        f"model {name_or_folder!r} is neither a folder here nor a well-known model; give a folder that holds config.json, or "
        f"one of {', '.join(MODELS)}",
        "model",
    )


def shape_of_folder(folder: Path) -> ModelShape:
    """Of a folder that holds config.json. Raises ModelError naming file, key and what would be right."""
    return shape_of_config(load_config(folder), folder.resolve().name)


def shape_of_config(config: ModelConfig, name: str) -> ModelShape:
    """Of what the engine read. A window over positions is not counted: such layers are priced as if they saw everything."""
    experts = config.experts
    return ModelShape(
        name=name,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=experts.inner_size if experts else config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_model_len=config.max_position_embeddings,
        gated=config.family != "opt",
        tied_embeddings=config.tied_embeddings,
        num_experts=experts.num_experts if experts else 0,
        experts_per_token=experts.num_chosen if experts else 0,
        dense_layers=len(experts.dense_layers) if experts else 0,
        dense_size=config.intermediate_size if experts and experts.dense_layers else 0,
        position_embeddings=config.max_position_embeddings + 2 if config.rope is None else 0,
    )


def _key(name: str) -> str:
    """What a name and a hub id have in common: no owner, no suffix that changes no size, no case and no punctuation but the
    points of numbers (1.3B is not 13B)."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    for ending in ("-hf", "-instruct", "-chat", "-v0.1"):
        last = last.replace(ending, "")
    return re.sub(r"(?<!\d)\.|\.(?!\d)|[^a-z0-9.]", "", last.replace("meta-", ""))


def _opt(size: str, layers: int, width: int, heads: int) -> ModelShape:
    return ModelShape(
        f"OPT-{size}", layers, width, 4 * width, heads, heads, width // heads, 50272, 2048,
        gated=False, tied_embeddings=True, position_embeddings=2050,
    )  # fmt: skip


def _catalogue() -> Iterator[ModelShape]:
    """Layers, width, inner size, heads, KV heads, head size, vocabulary, positions."""
    yield _opt("1.3B", 24, 2048, 32)
    yield _opt("2.7B", 32, 2560, 32)
    yield _opt("6.7B", 32, 4096, 32)
    yield _opt("13B", 40, 5120, 40)
    yield _opt("30B", 48, 7168, 56)
    yield _opt("66B", 64, 9216, 72)
    yield _opt("175B", 96, 12288, 96)
    yield ModelShape("Llama-2-7B", 32, 4096, 11008, 32, 32, 128, 32000, 4096)
    yield ModelShape("Llama-2-13B", 40, 5120, 13824, 40, 40, 128, 32000, 4096)
    yield ModelShape("Llama-2-70B", 80, 8192, 28672, 64, 8, 128, 32000, 4096)
    yield ModelShape("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 64, 128256, 131072, tied_embeddings=True)
    yield ModelShape("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256, 131072)
    yield ModelShape("Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128, 128256, 131072)
    yield ModelShape("Qwen3-8B", 36, 4096, 12288, 32, 8, 128, 151936, 40960)
    yield ModelShape("Qwen3-32B", 64, 5120, 25600, 64, 8, 128, 151936, 40960)
    yield ModelShape("Mixtral-8x7B", 32, 4096, 14336, 32, 8, 128, 32000, 32768, num_experts=8, experts_per_token=2)
    yield ModelShape("Qwen3-30B-A3B", 48, 2048, 768, 32, 4, 128, 151936, 40960, num_experts=128, experts_per_token=8)


MODELS = {shape.name: shape for shape in _catalogue()}
