"""The C interface of the native kernels as ctypes sees it: `csrc/native.h`, line by line."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p

import torch

TYPES = {torch.float32: 0, torch.bfloat16: 1}
GATES = {"silu": 0, "gelu_tanh": 1}
PANEL = 64  # outputs that are packed together


class Row(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in ("offset", "num_tokens", "start", "table", "packed")]


class Step(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("pool", "kv", "rows", "tables", "scratch")),
        *((name, c_int64) for name in ("num_rows", "num_layers", "kv_heads", "block_size", "head_dim")),
        ("type", c_int32),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("layer", "heads")),
        *((name, c_void_p) for name in ("qkv", "cosine", "sine", "out")),
        ("window", c_int64),
        *((name, c_float) for name in ("scale", "softcap")),
    ]


class Draw(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("seed", "sequence_index", "output_index", "top_k")),
        *((name, c_float) for name in ("temperature", "top_p", "min_p")),
    ]


class Weight(ctypes.Structure):
    _fields_ = [*((name, c_void_p) for name in ("packed", "bias")), *((name, c_int64) for name in ("inputs", "outputs"))]


class DecoderLayer(ctypes.Structure):
    _fields_ = [
        *((name, Weight) for name in ("qkv", "output", "gate_up", "down")),
        *((name, c_void_p) for name in ("query_norm", "key_norm", "mlp_norm", "next_norm")),
        *((name, c_int64) for name in ("heads", "window")),
        *((name, c_float) for name in ("scale", "softcap")),
        *((name, c_int32) for name in ("turn", "activation")),
    ]


class Stack(ctypes.Structure):
    _fields_ = [("layers", c_void_p), ("num_layers", c_int64), ("size", c_int64), ("eps", c_float)]


class Turns(ctypes.Structure):
    _fields_ = [("cosine", c_void_p), ("sine", c_void_p)]


class Buffers(ctypes.Structure):
    _fields_ = [*((name, c_void_p) for name in ("x", "normed", "qkv", "mixed", "inner")), ("tokens", c_int64)]


class Threads:
    """A pool of threads inside the library, ended with the last object that uses it."""

    def __init__(self, library: ctypes.CDLL, count: int) -> None:
        self._destroy = library.baton_pool_destroy
        self.handle = c_void_p(library.baton_pool_create(count))

    def __del__(self) -> None:
        self._destroy(self.handle)


def declare(library: ctypes.CDLL) -> None:
    """The signatures of csrc/native.h."""
    library.baton_features.restype = c_int32
    library.baton_features.argtypes = []
    library.baton_pool_create.restype = c_void_p
    library.baton_pool_create.argtypes = [c_int32]
    library.baton_pool_destroy.restype = None
    library.baton_pool_destroy.argtypes = [c_void_p]
    library.baton_pool_stream.restype = None
    library.baton_pool_stream.argtypes = [c_void_p]
    library.baton_packed_words.restype = c_int64
    library.baton_packed_words.argtypes = [c_int32, c_int64, c_int64]
    library.baton_pack.restype = None
    library.baton_pack.argtypes = [c_int32, c_void_p, c_int64, c_int64, c_void_p]
    library.baton_unpack_rows.restype = None
    library.baton_unpack_rows.argtypes = [c_int32, c_void_p, c_int64, c_void_p, c_int64, c_void_p]
    library.baton_linear.restype = None
    library.baton_linear.argtypes = [c_void_p, c_int32, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p]
    library.baton_gated_linear.restype = None
    library.baton_gated_linear.argtypes = [
        c_void_p,
        c_int32,
        c_int32,
        c_void_p,
        c_int64,
        c_void_p,
        c_int64,
        c_int64,
        c_void_p,
        c_void_p,
    ]
    library.baton_rms_norm.restype = None
    library.baton_rms_norm.argtypes = [
        c_void_p,
        c_int32,
        c_void_p,
        c_int64,
        c_void_p,
        c_void_p,
        c_float,
        c_int64,
        c_int64,
        c_void_p,
        c_void_p,
    ]
    library.baton_gated.restype = None
    library.baton_gated.argtypes = [c_void_p, c_int32, c_int32, c_void_p, c_int64, c_int64, c_void_p]
    library.baton_packed_row_words.restype = c_int64
    library.baton_packed_row_words.argtypes = [c_int32, c_int64, c_int64, c_int64]
    library.baton_argmax.restype = None
    library.baton_argmax.argtypes = [c_void_p, c_int32, c_void_p, c_int64, c_int64, c_void_p]
    library.baton_draw.restype = None
    library.baton_draw.argtypes = [c_void_p, c_void_p, c_int64, c_int64, POINTER(Draw), c_void_p]
    library.baton_stack.restype = None
    library.baton_stack.argtypes = [POINTER(Stack), POINTER(Step), POINTER(Turns), POINTER(Buffers)]
    library.baton_attention.restype = None
    library.baton_attention.argtypes = [POINTER(Step), POINTER(Layer)]
