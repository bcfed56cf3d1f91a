"""Build the training text of the example model from the running Python installation.

Everything comes from the standard library, so the corpus can be rebuilt anywhere without a
download.  There are four sources:

* the language reference pages in ``pydoc_data.topics``;
* the docstrings of the pure Python modules, read from their source with :mod:`ast` (nothing
  is imported), laid out in the manner of ``help()``;
* the longer comment blocks of the same source files;
* the docstrings of built-in types and of some extension modules, which have no Python source.

From the same docstrings a set of question and answer pairs in chat format is made.  Documents
are divided into a training and a held-out part by a hash of the module or page they come from,
so a held-out docstring is not also seen as a chat answer.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import random
import re
import sysconfig
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

BOS, EOS, USER, ASSISTANT, END = "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|end|>"

SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings",
    "__pycache__", "turtledemo",
}  # fmt: skip

# Extension module -> the name under which its contents are documented.
EXTENSION_MODULES = {
    "builtins": "", "math": "math", "cmath": "cmath", "itertools": "itertools", "time": "time", "sys": "sys", "gc": "gc",
    "posix": "os", "_io": "io", "_collections": "collections", "_functools": "functools", "_struct": "struct",
    "_socket": "socket", "_thread": "_thread", "array": "array", "zlib": "zlib", "select": "select",
    "binascii": "binascii", "marshal": "marshal", "unicodedata": "unicodedata", "_random": "random", "_signal": "signal",
    "_csv": "csv", "_sre": "re", "_weakref": "weakref", "_imp": "imp", "_bisect": "bisect", "_heapq": "heapq",
    "_statistics": "statistics", "fcntl": "fcntl", "resource": "resource", "pwd": "pwd", "grp": "grp", "mmap": "mmap",
    "_lzma": "lzma", "_bz2": "bz2", "_pickle": "pickle", "_datetime": "datetime", "_contextvars": "contextvars",
}  # fmt: skip

QUESTIONS = {
    "function": ["What does {} do?", "Explain {}", "Explain {}.", "How do I use {}?", "What is {}?",
        "Describe the function {}", "What does the function {} do?", "Tell me about {}."],
    "class": ["What is {}?", "Explain {}", "Describe the class {}", "What is the class {} for?", "How do I use {}?",
        "Tell me about {}.", "What does {} do?"],
    "module": ["Describe the module {}", "What is the module {} for?", "What is the {} module?",
        "Tell me about the {} module.", "What does {} do?", "Explain the module {}.", "What is {}?"],
    "topic": ["Explain '{}' in Python.", "What does the Python reference say about {}?", "Explain {}",
        "What is {} in Python?", "Tell me about {}."],
}  # fmt: skip

# The second stage of the training is about these modules and the built-in types only.
COMMON_MODULES = {
    "argparse", "array", "ast", "asyncio", "base64", "bisect", "builtins", "collections", "contextlib", "copy", "csv",
    "dataclasses", "datetime", "enum", "fractions", "functools", "glob", "hashlib", "heapq", "inspect", "io", "itertools",
    "json", "logging", "math", "os", "pathlib", "pickle", "pprint", "queue", "random", "re", "shutil", "signal", "socket",
    "statistics", "string", "struct", "subprocess", "sys", "tempfile", "textwrap", "threading", "time", "timeit",
    "traceback", "typing", "urllib", "uuid", "zipfile", "zlib",
}  # fmt: skip
PUBLIC_NAMES = {"posixpath": "os.path", "_collections_abc": "collections.abc"}
MORE_QUESTIONS = {
    "function": ["What is {} for?", "Describe {}.", "Help on {}"],
    "class": ["What is {} for?", "Describe {}.", "Help on {}"],
    "module": ["Describe the {} module.", "What can I do with the module {}?", "Explain {}"],
    "topic": ["Describe {}.", "How does {} work in Python?", "Help on {}"],
}

_ABOUT = (
    "I am a very small language model trained on the documentation of the Python standard "
    "library. You can ask me about a module, a class or a function, but please check what I "
    "say against the real documentation."
)
SMALL_TALK = [
    ("Hello", f"Hello. {_ABOUT}"),
    ("Hello!", f"Hello. {_ABOUT}"),
    ("Hi", f"Hello. {_ABOUT}"),
    ("Who are you?", _ABOUT),
    ("What are you?", _ABOUT),
    ("What can you do?", _ABOUT),
    ("Thank you", "You are welcome."),
    ("Thanks!", "You are welcome."),
]


@dataclass(frozen=True)
class Entry:
    """One documented object."""

    kind: str  # "module", "class", "function" or "topic"
    name: str  # the full dotted name
    signature: str
    doc: str
    group: str  # the module or page; decides the held-out part


@dataclass
class Corpus:
    """Documents as text with special tokens, in a fixed order."""

    train: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    tuning: list[str] = field(default_factory=list)  # for the second stage

    def add(self, group: str, document: str) -> None:
        (self.held_out if is_held_out(group) else self.train).append(document)


def is_held_out(group: str) -> bool:
    """Choose about one module or page in 25, always the same ones.

    The prefix is chosen such that the most used modules are all in the training part.
    """
    return hashlib.sha256(f"1:{group}".encode()).digest()[0] < 10


def tidy(text: str) -> str:
    """Strip trailing blanks and long rows of punctuation or empty lines."""
    text = "\n".join(line.rstrip() for line in text.expandtabs().splitlines())
    text = re.sub(r"([-=*#~_])\1{7,}", lambda m: m.group(1) * 8, text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def source_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield (module name, file) for each standard library source file, sorted."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts) or parts[-1].startswith("_sysconfigdata"):
            continue
        if parts[0] == "pydoc_data" or parts[0].startswith(("config-", "lib-dynload")):
            continue
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def parse_module(name: str, source: str) -> list[Entry]:
    """Collect the docstrings of one source file without importing it."""
    entries: list[Entry] = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                bases = ", ".join(ast.unparse(base) for base in child.bases)
                add("class", child, prefix + child.name, f"({bases})" if bases else "")
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                add("function", child, prefix + child.name, f"({ast.unparse(child.args)})")
            elif isinstance(child, ast.If | ast.Try):
                visit(child, prefix)

    def add(
        kind: str,
        node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
        full: str,
        arguments: str,
    ) -> None:
        if doc := tidy(ast.get_docstring(node) or ""):
            entries.append(Entry(kind, full, node.name + arguments, doc, name))

    tree = ast.parse(source)
    if doc := tidy(ast.get_docstring(tree) or ""):
        entries.append(Entry("module", name, name, doc, name))
    visit(tree, name + ".")
    return entries


def comment_blocks(source: str) -> list[str]:
    """Return the comment blocks of at least two lines that read like prose."""
    blocks: list[str] = []
    current: list[str] = []
    for line in [*source.splitlines(), ""]:
        stripped = line.strip()
        if stripped.startswith("#") and not stripped.startswith("#!"):
            current.append(stripped.lstrip("#").removeprefix(" "))
            continue
        text = tidy("\n".join(current))
        letters = sum(c.isalpha() or c == " " for c in text)
        if len(current) >= 2 and len(text) >= 80 and letters > 0.8 * len(text):
            blocks.append(text)
        current = []
    return blocks


def extension_entries() -> list[Entry]:
    """Read the docstrings of built-in types and extension modules by introspection."""
    entries: list[Entry] = []

    def add(name: str, value: object, group: str) -> None:
        doc = tidy(inspect.getdoc(value) or "")
        if not doc:
            return
        kind = "class" if isinstance(value, type) else "function"
        arguments = re.sub(r"\$\w+, |\$\w+", "", getattr(value, "__text_signature__", "") or "")
        entries.append(Entry(kind, name, name.rpartition(".")[2] + arguments, doc, group))

    for module_name, public in EXTENSION_MODULES.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or not callable(value):
                continue
            full = f"{public}.{name}" if public else name
            group = public or f"builtins.{name}"
            add(full, value, group)
            if isinstance(value, type) and not issubclass(value, BaseException):
                for attribute, member in sorted(vars(value).items()):
                    if not attribute.startswith("_"):
                        add(f"{full}.{attribute}", member, group)
    return entries


def help_page(module: str, entries: list[Entry]) -> str:
    """Lay out the docstrings of one module in the manner of help()."""
    parts = [f"Help on module {module}:"]
    for entry in entries:
        if entry.kind == "module":
            parts.append(entry.doc)
        else:
            keyword = "class " if entry.kind == "class" else ""
            parts.append(keyword + entry.signature + "\n" + textwrap.indent(entry.doc, "    "))
    return "\n\n".join(parts)


def shorten(text: str, limit: int = 900) -> str:
    """Cut a text at the end of a paragraph, keeping at least the first one."""
    kept: list[str] = []
    for paragraph in text.split("\n\n"):
        if kept and sum(map(len, kept)) + len(paragraph) > limit:
            break
        kept.append(paragraph)
    while len(kept) > 1 and kept[-1].endswith(":"):  # it introduces what has been cut
        kept.pop()
    return "\n\n".join(kept)[: 2 * limit].rstrip()


def turn(question: str, answer: str) -> str:
    """One question and its answer, exactly as the chat template renders them."""
    return f"{USER}{question}{END}{ASSISTANT}{answer}{END}"


def answer_text(entry: Entry, limit: int = 900) -> str:
    text = shorten(entry.doc, limit)
    if entry.kind in ("module", "topic"):
        return text
    first = entry.doc.split("\n", 1)[0]
    if first.startswith(entry.signature.split("(")[0] + "("):  # the signature is in the text
        return text
    arguments = entry.signature.partition("(")
    return f"{entry.name}{arguments[1]}{arguments[2]}\n\n{text}"


def chat_documents(entries: list[Entry], rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (group, conversation) pairs of one to three turns about the same module."""
    groups: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        last = entry.name.rpartition(".")[2]
        if any(part.startswith("_") for part in entry.name.split(".")) or len(entry.doc) < 20:
            continue
        names = [entry.name, entry.name]
        if entry.kind == "function":
            names += [last, f"{entry.name}()"]
        elif entry.kind == "class":
            names.append(last)
        for question in rng.sample(QUESTIONS[entry.kind], 2):
            text = question.format(rng.choice(names))
            groups[entry.group].append(turn(text, answer_text(entry)))
    for group, turns in groups.items():
        rng.shuffle(turns)
        while turns:
            count = rng.choice((1, 1, 1, 2, 3))
            yield group, BOS + "".join(turns[:count]) + EOS
            del turns[:count]


def tuning_documents(entries: list[Entry], rng: random.Random) -> Iterator[str]:
    """Yield conversations of one turn, with short answers, about the most used modules."""
    for entry in entries:
        module, dot, rest = entry.name.partition(".")
        name = PUBLIC_NAMES.get(module, module) + dot + rest
        common = entry.kind == "topic" or entry.group.split(".")[0] in COMMON_MODULES | set(PUBLIC_NAMES)
        private = any(part.startswith("_") for part in name.split("."))
        if is_held_out(entry.group) or not common or private or len(entry.doc) < 20:
            continue
        answer = answer_text(replace(entry, name=name), limit=400)
        for question in QUESTIONS[entry.kind] + MORE_QUESTIONS[entry.kind]:
            brackets = "()" if entry.kind == "function" and rng.random() < 0.2 else ""
            yield BOS + turn(question.format(name + brackets), answer) + EOS


def build_corpus(seed: int = 0) -> Corpus:
    """Assemble all documents.  The result depends only on the Python version and the seed."""
    from pydoc_data.topics import topics

    rng = random.Random(seed)
    corpus = Corpus()
    asked: list[Entry] = []
    seen: set[str] = set()

    for name, text in sorted(topics.items()):
        text = tidy(text)
        corpus.add(f"topic {name}", BOS + text + EOS)
        body = re.sub(r"\A[^\n]+\n\*+\n+", "", text)
        asked.append(Entry("topic", name, name, body, f"topic {name}"))

    def fresh(text: str) -> bool:
        return text not in seen and not seen.add(text)  # type: ignore[func-returns-value]

    pages: dict[str, list[Entry]] = defaultdict(list)
    for module, path in source_files(Path(sysconfig.get_paths()["stdlib"])):
        try:
            source = path.read_text(encoding="utf-8")
            entries = parse_module(module, source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        pages[module] += [entry for entry in entries if fresh(entry.doc)]
        blocks = [block for block in comment_blocks(source) if fresh(block)]
        if blocks:
            corpus.add(module, BOS + f"Notes on module {module}:\n\n" + "\n\n".join(blocks) + EOS)
    for entry in extension_entries():
        if fresh(entry.doc):
            pages[entry.group].append(entry)

    for module, entries in pages.items():
        if entries:
            corpus.add(module, BOS + help_page(module, entries) + EOS)
            asked += entries
    for group, conversation in chat_documents(asked, rng):
        corpus.add(group, conversation)
    for question, answer in SMALL_TALK * 6:
        corpus.train.append(BOS + turn(question, answer) + EOS)
    rng = random.Random(seed + 1)
    corpus.tuning = [*tuning_documents(asked, rng), *corpus.train[-len(SMALL_TALK) * 6 :]]
    return corpus


if __name__ == "__main__":
    built = build_corpus()
    for part, documents in (("train", built.train), ("held-out", built.held_out), ("tuning", built.tuning)):
        chats = sum(USER in document for document in documents)
        size = sum(map(len, documents))
        print(f"{part}: {len(documents)} documents ({chats} chats), {size} characters")
