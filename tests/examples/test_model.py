"""The model that ships with the repository: files, tokenizer, chat template and language."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "model"
MODEL = EXAMPLE / "pydoc-llama"
MAX_BYTES = 8_000_000

# Written for this test in the manner of the documentation; not part of the training text.
SNIPPET = """\
Return a copy of the mapping with the given keys removed.

If a key is not found, KeyError is raised, unless the optional argument
*default* is given, in which case it is returned instead.  The values of
the new dictionary are the same objects as those of the original one. This
method must be called with at least one argument; otherwise a TypeError
exception is raised.  Changed in version 3.9: the keys can be any iterable.
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is too small to gain from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_corpus", EXAMPLE / "corpus.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def mean_loss(model: Any, ids: torch.Tensor) -> float:
    """Mean negative log likelihood, in nats, of each token after the first."""
    logits = model(ids[None]).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[1:]).item()


@torch.no_grad()
def greedy(model: Any, ids: list[int], limit: int, stop: set[int]) -> list[int]:
    """Continue a prompt, with the key/value cache, up to a stop token or the limit."""
    out: list[int] = []
    step = torch.tensor([ids])
    cache = None
    while len(out) < limit:
        result = model(step, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        out.append(int(result.logits[0, -1].argmax()))
        if out[-1] in stop:
            break
        step = torch.tensor([[out[-1]]])
    return out


def test_folder_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= MAX_BYTES


def test_configuration(tokenizer: Any) -> None:
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((MODEL / "generation_config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["max_position_embeddings"] == 1024
    assert config["tie_word_embeddings"] is True
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["vocab_size"] == len(tokenizer)
    ends = tokenizer.convert_tokens_to_ids(["<|eos|>", "<|end|>"])
    assert None not in ends
    assert generation["eos_token_id"] == ends
    assert generation["bos_token_id"] == tokenizer.bos_token_id == config["bos_token_id"]
    assert tokenizer.eos_token_id in ends


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loads_in_both_precisions(dtype: torch.dtype, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()
    assert model.dtype == dtype
    ids = torch.tensor(tokenizer(SNIPPET).input_ids)
    assert mean_loss(model, ids) < 5.0


@pytest.mark.parametrize("text", ["a = [1, 22, 4096]\n    return  a\n", "naïve – 中文 🐍", ""])
def test_tokenizer_round_trip(text: str, tokenizer: Any) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_model_has_learnt_the_language(model: Any, tokenizer: Any) -> None:
    ids = torch.tensor(tokenizer(SNIPPET).input_ids)
    loss = mean_loss(model, ids)
    assert loss < 5.0 < math.log(len(tokenizer))
    # The order of the words matters, which it would not to a unigram model.
    order = torch.randperm(len(ids) - 1, generator=torch.Generator().manual_seed(0))
    assert loss + 1.0 < mean_loss(model, torch.cat([ids[:1], ids[1:][order]]))


def test_long_context_is_no_worse(model: Any, tokenizer: Any) -> None:
    """Positions close to the limit were trained too."""
    ids = tokenizer(SNIPPET * 20).input_ids[:1024]
    assert len(ids) == 1024
    assert mean_loss(model, torch.tensor(ids)) < 5.0
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, 900:-1]
    assert torch.nn.functional.cross_entropy(logits, torch.tensor(ids[901:])).item() < 5.0


def test_greedy_continuation_is_text(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("The module is used to").input_ids
    text = tokenizer.decode(greedy(model, ids, 40, set()), skip_special_tokens=True)
    assert len(text.split()) >= 10
    assert sum(c.isascii() and (c.isalpha() or c.isspace()) for c in text) > 0.7 * len(text)


@pytest.mark.parametrize(
    ("question", "word"),
    [("What does os.path.join do?", "pathname"), ("Describe the module json", "JSON"), ("Hello", "Python")],
)
def test_chat_answer_is_to_the_point_and_ends(question: str, word: str, model: Any, tokenizer: Any) -> None:
    message = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    stop = set(tokenizer.convert_tokens_to_ids(["<|eos|>", "<|end|>"]))
    answer = greedy(model, ids, 400, stop)
    assert answer[-1] == tokenizer.convert_tokens_to_ids("<|end|>")
    assert word in tokenizer.decode(answer[:-1])


def test_chat_template(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is a list? "},
        {"role": "assistant", "content": "A sequence."},
        {"role": "user", "content": [{"type": "text", "text": "And a "}, {"type": "text", "text": "set?"}]},
    ]
    expected = (
        "<|bos|><|user|>Be brief.\n\nWhat is a list?<|end|><|assistant|>A sequence.<|end|><|user|>And a set?<|end|><|assistant|>"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == tokenizer(expected, add_special_tokens=False).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert not tokenizer.apply_chat_template(messages, tokenize=False).endswith("<|assistant|>")


def test_chat_template_matches_the_training_text(corpus: ModuleType, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == corpus.BOS + corpus.turn("Hi", "Hello.")


def test_chat_template_refuses_unknown_roles(tokenizer: Any) -> None:
    with pytest.raises(TemplateError, match="unknown role"):
        tokenizer.apply_chat_template([{"role": "narrator", "content": "x"}], tokenize=False)


def test_corpus_reads_docstrings_without_importing(corpus: ModuleType) -> None:
    source = '"""Top."""\nraise SystemExit\nclass A(B):\n    """Kind."""\n    def f(self, x=1):\n        "Do it."\n'
    entries = corpus.parse_module("m", source)
    assert [(e.kind, e.name, e.signature, e.doc) for e in entries] == [
        ("module", "m", "m", "Top."),
        ("class", "m.A", "A(B)", "Kind."),
        ("function", "m.A.f", "f(self, x=1)", "Do it."),
    ]
    assert corpus.help_page("m", entries[1:2]) == "Help on module m:\n\nclass A(B)\n    Kind."
    assert corpus.answer_text(entries[2]) == "m.A.f(self, x=1)\n\nDo it."


def test_corpus_keeps_prose_comments_only(corpus: ModuleType) -> None:
    prose = "# This is a comment which is long enough to be kept, because it\n# explains something in words.\n"
    assert corpus.comment_blocks(prose + "x = 1\n# short\n") == [prose.replace("# ", "").strip()]
    assert corpus.comment_blocks("# 0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06\n" * 3) == []


def test_held_out_part_is_small_and_fixed(corpus: ModuleType) -> None:
    chosen = sum(corpus.is_held_out(f"module{i}") for i in range(2000))
    assert 0.02 < chosen / 2000 < 0.06
    assert not corpus.is_held_out("json")
