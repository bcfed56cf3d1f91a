"""How a checkpoint's weights are packed, as config.json describes it under `quantization_config`. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from .config_file import ConfigFile

QUANTIZATION_BITS = {"gptq": (4, 8), "awq": (4,)}  # quant_method -> bits of a weight


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """How packed linears are stored; see `quantized`. Tensors that are not packed are read as they are.

    method      "gptq" or "awq"
    group_size  inputs that share a scale and a zero-point; None for all inputs of a linear
    ordered     inputs belong to groups by the order in which they were quantised (GPTQ's desc_act)
    zero_points "plain", "minus_one" (each stored as one less) or "minus_one_words" (32-bit words less one in each
                field, in which a zero borrows from the field above)
    """

    method: str
    bits: int
    group_size: int | None
    ordered: bool = False
    zero_points: str = "plain"


def read_quantization(file: ConfigFile) -> QuantizationConfig | None:
    """None when all weights are stored as they are. Raises ModelError for a method or layout that is not supported."""
    if not file.has("quantization_config"):
        return None
    fields = file.section("quantization_config")
    method = fields.text("quant_method", "")
    if method not in QUANTIZATION_BITS:
        raise fields.wrong("quant_method", f"one of {', '.join(QUANTIZATION_BITS)}, or the model one that is not quantised")
    bits = fields.integer("bits")
    if bits not in QUANTIZATION_BITS[method]:
        raise fields.wrong("bits", f"{' or '.join(map(str, QUANTIZATION_BITS[method]))} for quant_method {method!r}")
    group_size = None if fields.is_exactly("group_size", -1) else fields.integer("group_size")
    if method == "awq":
        for key in ("version", "checkpoint_format", "format"):
            if fields.text(key, "gemm").lower() != "gemm":
                raise fields.wrong(key, "'gemm'")
        if fields.text("backend", "autoawq") == "llm-awq":
            raise fields.wrong("backend", "'autoawq': weights packed by llm-awq have another layout")
        return QuantizationConfig(method, bits, group_size)
    return QuantizationConfig(method, bits, group_size, fields.flag("desc_act"), _gptq_zero_points(fields))


def _gptq_zero_points(fields: ConfigFile) -> str:
    key = "checkpoint_format" if fields.has("checkpoint_format") else "format"
    layout = fields.text(key, "gptq").lower()
    if layout not in ("gptq", "gptq_v2"):
        raise fields.wrong(key, "'gptq' or 'gptq_v2'")
    if fields.text("pack_dtype", "int32").removeprefix("torch.") != "int32":
        raise fields.wrong("pack_dtype", "'int32'")
    patterns = fields.section("dynamic").keys()
    if any(not pattern.startswith("-:") for pattern in patterns):  # "-:" leaves modules out
        raise fields.wrong("dynamic", "absent, or hold only modules left out ('-:...'): all must be packed alike")
    if layout == "gptq_v2":
        return "plain"
    # GPTQModel turns plain zero-points into the first format by arithmetic on whole words.
    writers = fields.section("meta").texts_or_text("quantizer")
    return "minus_one_words" if any(writer.startswith("gptqmodel") for writer in writers) else "minus_one"
