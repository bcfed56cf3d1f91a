"""The figures of a report, each from the raw records. Seconds and milliseconds as a reader expects them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.slo import Slo
from ..observability.svg import WIDE, Plot, Scale, fitting_scale
from .metrics import met
from .records import LoadResult, RequestRecord

NUM_BINS = 48
MAX_LIFELINES = 300


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: `legend` is pairs of a colour class and its meaning; a `wide` one takes the page's whole width."""

    title: str
    note: str
    svg: str
    legend: tuple[tuple[str, str], ...] = ()
    wide: bool = False


def figures(result: LoadResult, slo: Slo) -> list[Figure]:
    """Those that the run has data for."""
    records = result.records
    if not records:
        return []
    made = [_first_tokens(records, slo, result.duration)]
    first = [record.ttft for record in records if record.ok and record.ttft is not None]
    between = [record.tpot for record in records if record.ok and record.tpot is not None]
    if first:
        made.append(_spread("TTFT", "time to first token", first, slo.ttft))
    if between:
        made.append(_spread("TPOT", "time per output token after the first", between, slo.tpot))
    made += [_progress(records, result.duration), _lifelines(records, result.duration, slo)]
    return made


def _first_tokens(records: Sequence[RequestRecord], slo: Slo, duration: float) -> Figure:
    seen = [(record, record.ttft) for record in records if record.ttft is not None and record.ok]
    in_ms = max([slo.ttft, *(ttft for _, ttft in seen)]) < 2.0
    factor, unit = (1000.0, " ms") if in_ms else (1.0, " s")
    y = fitting_scale([ttft * factor for _, ttft in seen], [slo.ttft * factor], unit)
    plot = Plot(_time_scale(duration), y, "offered, seconds into the run", "time to first token", WIDE)
    radius = 3.2 if len(seen) <= 400 else 1.8
    for record, ttft in seen:
        good = met(record, slo)
        plot.dot(record.offered, ttft * factor, "met" if good else "missed", _tip(record), radius)
    for record in records:
        if not record.ok:
            plot.cross(record.offered, "failed", _tip(record))
    plot.rule_across(slo.ttft * factor, f"objective {_seconds(slo.ttft)}")
    note = "One dot per request, at the moment it was offered."
    return Figure("Time to first token", note, plot.svg("TTFT over time"), _legend(records, slo), wide=True)


def _spread(short: str, long: str, values: Sequence[float], objective: float) -> Figure:
    in_ms = max(*values, objective) < 2.0
    factor, unit = (1000.0, " ms") if in_ms else (1.0, " s")
    shown = [value * factor for value in values]
    x = fitting_scale(shown, [objective * factor], unit)
    counts = [0] * NUM_BINS
    for value in shown:
        counts[min(int(x.place(value) * NUM_BINS), NUM_BINS - 1)] += 1
    y = Scale(0.0, 100.0, unit=" %")
    plot = Plot(x, y, long, "share of requests")
    tallest = max(counts)
    for number, count in enumerate(counts):
        if count:
            low, high = x.value(number / NUM_BINS), x.value((number + 1) / NUM_BINS)
            tip = f"{count} requests between {x.label(low)} and {x.label(high)}"
            plot.bar(low, high, 0.0, 60.0 * count / tallest, "met" if low < objective * factor else "missed", tip, gap=1.0)
    plot.steps(sorted(shown), "strong", 100.0)
    within = sum(value <= objective for value in values) / len(values)
    plot.rule_down(objective * factor, f"objective {_seconds(objective)}")
    note = f"{within:.1%} of {len(values)} finished requests are within the objective."
    legend = (("strong", "share of requests up to here"), ("met", "how many fall here (relative)"))
    return Figure(f"{short} distribution", note, plot.svg(f"{short} distribution"), legend)


def _progress(records: Sequence[RequestRecord], duration: float) -> Figure:
    plot = Plot(_time_scale(duration), Scale(0.0, len(records) * 1.04), "seconds into the run", "requests so far", WIDE)
    rows = (
        ("faint", "offered", [record.offered for record in records]),
        ("second", "first token", [record.chunk_times[0] for record in records if record.chunk_times]),
        ("strong", "finished", [record.end for record in records if record.ok and record.end is not None]),
    )
    for name, _, moments in rows:
        plot.steps(sorted(moments), name, len(moments))
    note = "Between the lines are the requests that wait for a first token, and those that decode."
    legend = tuple((name, meaning) for name, meaning, _ in rows)
    return Figure("Arrivals and completions", note, plot.svg("arrivals and completions over time"), legend, wide=True)


def _lifelines(records: Sequence[RequestRecord], duration: float, slo: Slo) -> Figure:
    stride = -(-len(records) // MAX_LIFELINES)
    shown = records[::stride]
    height = min(max(180, 60 + 5 * len(shown)), 760)  # a row must be seen, and the whole fit on a screen
    rows = Scale(-float(len(shown)), 0.0)
    plot = Plot(_time_scale(duration), rows, "seconds into the run", "in order of arrival", WIDE, height, y_ticks=False)
    for row, record in enumerate(shown):
        low, high = -row - 0.9, -row - 0.1
        end = duration if record.end is None else record.end
        tip = _tip(record)
        if not record.ok:
            plot.bar(record.offered, end, low, high, "failed", tip)
            continue
        first = record.chunk_times[0]
        plot.bar(record.offered, first, low, high, "waiting", tip)
        plot.bar(first, end, low, high, "met" if met(record, slo) else "missed", tip)
    title = "Every request" if stride == 1 else f"One request in {stride}"
    legend = (("waiting", "until the first token"), *_legend(shown, slo))
    note = "From the moment it was offered to its last token."
    return Figure(title, note, plot.svg("life of every request"), legend, wide=True)


def _legend(records: Sequence[RequestRecord], slo: Slo) -> tuple[tuple[str, str], ...]:
    good = sum(met(record, slo) for record in records)
    failed = sum(not record.ok for record in records)
    rows = (
        ("met", "met both objectives", good),
        ("missed", "missed one", len(records) - good - failed),
        ("failed", "failed", failed),
    )
    return tuple((name, f"{text} ({count})") for name, text, count in rows if count or name == "met")


def _time_scale(duration: float) -> Scale:
    return Scale(0.0, max(duration, 1e-3), unit="")


def _tip(record: RequestRecord) -> str:
    what = f"#{record.index} at {record.offered:.2f} s, {record.prompt_tokens or record.input_tokens} in, {record.num_tokens} out"
    if not record.ok:
        return f"{what}: {record.error or 'no token'} {record.message}"
    tpot = "" if record.tpot is None else f", TPOT {_seconds(record.tpot)}"
    return f"{what}: TTFT {_seconds(record.ttft or 0.0)}{tpot}"


def _seconds(value: float) -> str:
    return f"{value * 1000:.4g} ms" if value < 1 else f"{value:.4g} s"
