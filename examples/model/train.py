"""Train the small Llama that ships with the repository as a demonstration model.

The examples and the tests need a real model that is small enough to be kept in the repository
and that anybody can rebuild.  This script makes one on a single processor core: it collects
the documentation of the Python standard library (see corpus.py), trains a byte-level BPE
tokenizer and a Llama of about 3.6 million parameters on it, and writes both in Hugging Face
format.  The folder can then be loaded by transformers or by any server that reads that format.

    python examples/model/train.py --steps 3600 --minutes 40
    python examples/model/train.py --tune --steps 900 --dropout 0 --learning-rate 1.5e-3

The second command continues from the result of the first.  It shows the model the ordinary
documents once more, but chats about the most used modules only, and many times, so that it
can answer common questions.  The first stage saves the model each time the held-out loss
improves, the second at each evaluation, so that an interrupted run leaves a usable model.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from corpus import ASSISTANT, BOS, END, EOS, USER, Corpus, build_corpus
from losses import read_log, write_log
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
SPECIAL_TOKENS = [BOS, EOS, USER, ASSISTANT, END]
CONTEXT = 1024
TOKENS_PER_STEP = 4096
ROW_LENGTHS = (256, 512, 256, 1024)  # used in turn; short rows are faster
MODEL_SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 576,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}

# A system message has no token of its own; its text is put before the first question.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- set ns = namespace(system='') %}"
    "{%- for message in messages %}"
    "{%- if message.content is string %}{%- set text = message.content %}"
    "{%- else %}{%- set text = message.content | map(attribute='text') | join('') %}{%- endif %}"
    "{%- if message.role in ('system', 'developer') %}"
    "{%- set ns.system = ns.system + text | trim + '\\n\\n' %}"
    "{%- elif message.role == 'user' %}"
    "{{- '<|user|>' + ns.system + text | trim + '<|end|>' }}{%- set ns.system = '' %}"
    "{%- elif message.role == 'assistant' %}"
    "{{- '<|assistant|>' + text | trim + '<|end|>' }}"
    "{%- else %}{{- raise_exception('unknown role: ' + message.role) }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def train_tokenizer(documents: list[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; special tokens get the ids 0 to 4."""
    tokenizer = Tokenizer(models.BPE())
    # Rows of blanks stay together, so that indentation costs few tokens.
    split = Regex(r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Plain documents only: the chat part repeats them.
    tokenizer.train_from_iterator((d.removeprefix(BOS).removesuffix(EOS) for d in documents if USER not in d), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json with the chat template."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "additional_special_tokens": [USER, ASSISTANT, END],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2) + "\n"
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")


def make_model(tokenizer: Tokenizer, dropout: float) -> LlamaForCausalLM:
    """Build an untrained Llama, with dropout on the output of each attention and MLP block."""
    config = LlamaConfig(
        **MODEL_SHAPE,
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=[tokenizer.token_to_id(EOS), tokenizer.token_to_id(END)],
        pad_token_id=None,
        use_cache=True,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, do_sample=False
    )

    def drop(module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return nn.functional.dropout(output, dropout, module.training)

    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj", "embed_tokens")):
            module.register_forward_hook(drop)
    return model


def save_model(model: LlamaForCausalLM, out: Path) -> None:
    """Save a bfloat16 copy in Hugging Face format (the model itself stays in float32)."""
    weights = {k: v.to(torch.bfloat16) for k, v in model.state_dict().items()}
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(weights)
    copy.tie_weights()
    copy.generation_config = model.generation_config
    copy.save_pretrained(out)


class Batches:
    """The training tokens, cut into windows, each once per pass in random order."""

    def __init__(self, documents: list[list[int]], rng: random.Random) -> None:
        self.documents = documents
        self.rng = rng
        self.windows: list[list[int]] = []

    def next(self, length: int) -> Tensor:
        """Return a batch of TOKENS_PER_STEP tokens in rows of the given length."""
        rows: list[list[int]] = []
        while len(rows) * length < TOKENS_PER_STEP:
            if not self.windows:
                self._start_pass()
            window = self.windows.pop()
            rows += [window[i : i + length + 1] for i in range(0, CONTEXT, length)]
        return torch.tensor(rows)

    def _start_pass(self) -> None:
        """Join the documents in a new order and cut the result from a random place on."""
        self.rng.shuffle(self.documents)
        stream = [token for document in self.documents for token in document]
        starts = range(self.rng.randrange(CONTEXT), len(stream) - CONTEXT - 1, CONTEXT)
        self.windows = [stream[start : start + CONTEXT + 1] for start in starts]
        self.rng.shuffle(self.windows)


def row_losses(model: LlamaForCausalLM, hidden: Tensor, rows: Tensor) -> Iterator[Tensor]:
    """Yield the mean negative log likelihood per token of each row, in nats.

    Row by row, because the logits of a whole batch do not fit the processor's cache.
    """
    for states, row in zip(hidden, rows, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.lm_head(states)
        yield nn.functional.cross_entropy(logits.float(), row[1:])


def train_step(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Add the gradients of one batch and return its loss."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(rows[:, :-1], use_cache=False).last_hidden_state
    leaf = hidden.detach().requires_grad_()
    total = 0.0
    for loss in row_losses(model, leaf, rows):
        (loss / len(rows)).backward()  # type: ignore[no-untyped-call]
        total += loss.item() / len(rows)
    hidden.backward(leaf.grad)
    return total


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokens: list[int], length: int = 512) -> float:
    """Loss on the held-out documents."""
    model.eval()
    losses: list[float] = []
    for start in range(0, len(tokens) - length, length):
        rows = torch.tensor([tokens[start : start + length + 1]])
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(rows[:, :-1], use_cache=False).last_hidden_state
        losses += [loss.item() for loss in row_losses(model, hidden, rows)]
    model.train()
    return sum(losses) / len(losses)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norm weights.

    On this corpus Muon needs far fewer tokens than AdamW alone for the same loss.
    """
    blocks = list(model.model.layers.parameters())
    embedding = {"params": [model.model.embed_tokens.weight], "weight_decay": 0.1}
    vectors = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}
    return [
        torch.optim.Muon([p for p in blocks if p.ndim == 2], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([embedding, vectors], betas=(0.9, 0.95), fused=True),
    ]


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 3 per cent, then a cosine down to 2 per cent of the peak."""
    if progress < 0.03:
        return peak * max(progress, 1e-3) / 0.03
    return peak * (0.02 + 0.49 * (1 + math.cos(math.pi * (progress - 0.03) / 0.97)))


def train(arguments: argparse.Namespace, corpus: Corpus) -> None:
    out: Path = arguments.out
    rng = random.Random(arguments.seed)
    log: list[dict[str, Any]] = []
    if arguments.tune:
        tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
        texts = [text for text in corpus.train if USER not in text] + corpus.tuning
        log = read_log(out.parent)
    else:
        tokenizer = train_tokenizer(corpus.train, arguments.vocabulary)
        save_tokenizer(tokenizer, out)
        texts = corpus.train

    def encode(documents: list[str]) -> list[list[int]]:
        batch = tokenizer.encode_batch(documents, add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    documents = encode(texts)
    held_out = [token for document in encode(corpus.held_out) for token in document]
    model = make_model(tokenizer, arguments.dropout)
    if arguments.tune:
        weights = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
        model.load_state_dict(weights)
    optimizers = make_optimizers(model)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {sum(map(len, documents))} training tokens, "
          f"{len(held_out)} held-out tokens", flush=True)  # fmt: skip

    batches = Batches(documents, rng)
    before = log[-1] if log else {"step": 0, "tokens": 0, "seconds": 0}
    recent: list[float] = []
    best = math.inf
    started = time.monotonic()
    step, progress = 0, 0.0
    while progress < 1.0:
        rows = batches.next(ROW_LENGTHS[step % len(ROW_LENGTHS)])
        recent.append(train_step(model, rows))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, arguments.learning_rate)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds = time.monotonic() - started
        progress = step / arguments.steps
        if arguments.minutes:  # the schedule then ends early on a slow machine
            progress = max(progress, seconds / (60 * arguments.minutes))
        if step % arguments.evaluate_every and progress < 1.0:
            continue
        held = evaluate(model, held_out)
        average = sum(recent) / len(recent)
        recent.clear()
        log.append(
            {
                "step": before["step"] + step,
                "tokens": before["tokens"] + step * TOKENS_PER_STEP,
                "seconds": before["seconds"] + round(seconds),
                "train_loss": round(average, 4),
                "held_out_loss": round(held, 4),
            }
        )
        print(log[-1], flush=True)
        write_log(log, out.parent)
        if arguments.tune or held < best:
            save_model(model, out)
        best = min(best, held)
    print(f"lowest held-out loss {best:.3f}, {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small demonstration model.")
    parser.add_argument("--out", type=Path, default=HERE / "pydoc-llama", help="model folder")
    parser.add_argument("--steps", type=int, default=3600, help=f"{TOKENS_PER_STEP} tokens each")
    parser.add_argument("--tune", action="store_true", help="second stage: continue with --out")
    parser.add_argument("--minutes", type=float, help="stop, with a full schedule, after these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--evaluate-every", type=int, default=100, help="steps")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    train(arguments, build_corpus(arguments.seed))


if __name__ == "__main__":
    main()
