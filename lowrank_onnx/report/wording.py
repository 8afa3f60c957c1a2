"""What a report says in words; the terminal and the page speak the same sentences."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lowrank_onnx.report import units
from lowrank_onnx.report.units import DASH, NBSP, finite, plain

_TARGETS = {
    "keep_params": "keep at most {} of the parameters",
    "keep_macs": "keep at most {} of the multiply-accumulates",
    "keep_size": "keep at most {} of the file size",
    "speedup": "at least {} times faster",
    "max_drop": "lose at most {} of the quality",
    "rank": "rank {} at every layer",
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One line of the table before/after, as text; ``share`` is after / before, or None."""

    label: str
    before: str
    after: str
    outcome: str
    share: float | None


def asked(report: Mapping[str, Any]) -> str:
    """Return what the user asked for: a target, or a comparison with another model."""
    if other := report.get("candidate"):
        return f"Compared with {plain(other['path'])}."
    return f"Target: {target(report)}."


def sentence(text: Any) -> str:
    """Return a clause as a sentence: warnings and notes are collected as clauses."""
    words = plain(text).strip()
    return words[:1].upper() + words[1:] + ("" if not words or words.endswith((".", "!", "?")) else ".")


def notes(report: Mapping[str, Any]) -> list[str]:
    """Return sentences that go under the table before/after: what was measured, on what, and what errors mean."""
    layers = report["sites"]
    said = (
        fidelity(report),
        metric_samples(report),
        errors(report) if layers else "",
        chains(layers),
        sentence((report.get("data") or {}).get("note") or ""),
    )
    return [text for text in said if text]


def target(report: Mapping[str, Any]) -> str:
    """Return what the user asked for."""
    words = []
    for key, value in (report.get("target") or {}).items():
        number = finite(value)
        told = units.percent(number) if key == "max_drop" and number is not None else plain(value)
        words.append(_TARGETS[key].format(told) if key in _TARGETS else f"{plain(key)} {told}")
    return "; ".join(words) or "none"


def headline(report: Mapping[str, Any]) -> str:
    """Return the result in one sentence: what is left, how fast, how good."""
    parts = [share(report), speed(report), quality(report)]
    result = ", ".join(part for part in parts if part) + "."
    if not factorized(report["sites"]) and not report.get("candidate"):
        return f"No layer was factorized: {result}" if report["sites"] else f"No layer to factorize: {result}"
    return result


def share(report: Mapping[str, Any]) -> str:
    """Return what is left of the model, in the quantity the target names, else MACs, else parameters."""
    ratios = report["ratio"]
    named = {"keep_params": "parameters", "keep_size": "size", "keep_macs": "macs"}
    wanted = [named[key] for key in report.get("target") or {} if key in named]
    nouns = {"macs": "MACs", "parameters": "parameters", "size": "file size"}
    for key in (*wanted, *nouns):
        if finite(ratios.get(key)) is not None:
            return f"{units.ratio(ratios[key])} of the {nouns[key]}"
    return "size unknown"


def speed(report: Mapping[str, Any]) -> str | None:
    """Return the speed-up with its interval; an interval around 1 is no change; None if not measured."""
    ratios = report["ratio"]
    speedup = finite(ratios.get("speedup"))
    if speedup is None:
        return None
    if _around_one(ratios):
        return f"no measurable change in speed{interval(ratios)}"
    if speedup >= 1:
        return f"{units.ratio(speedup)} times faster{interval(ratios)}"
    return f"slower, at {units.ratio(speedup)} of the speed{interval(ratios)}"


def _around_one(ratios: Mapping[str, Any]) -> bool:
    """Whether the interval of the speed-up, as it is shown, holds 1."""
    low, high = finite(ratios.get("speedup_low")), finite(ratios.get("speedup_high"))
    return low is not None and high is not None and round(low, 2) <= 1 <= round(high, 2)


def interval(ratios: Mapping[str, Any]) -> str:
    """Return the 95 % interval of the speed-up in brackets, or nothing."""
    low, high = finite(ratios.get("speedup_low")), finite(ratios.get("speedup_high"))
    return "" if low is None or high is None else f" ({units.ratio(low)}–{units.ratio(high)})"


def quality(report: Mapping[str, Any]) -> str:
    """Return the change of the metric, else the fidelity to the original, else that nothing was measured."""
    metric, fidelity = report.get("metric") or {}, report.get("fidelity") or {}
    if finite(metric.get("relative_drop")) is not None:
        return f"{plain(metric['name'])} {units.change(metric['relative_drop'])}"
    if finite(fidelity.get("sqnr_db")) is not None:
        return f"SQNR {decibels(fidelity['sqnr_db'])} against the original"
    if finite(fidelity.get("cosine")) is not None:
        return f"cosine {similarity(fidelity['cosine'])} to the original"
    return "quality not measured"


def comparisons(report: Mapping[str, Any]) -> list[Comparison]:
    """Return the lines of the table before/after."""
    before, after, ratios = report["before"], report["after"], report["ratio"]

    def line(label: str, key: str, ratio: str, show: Any) -> Comparison:
        left = finite(ratios.get(ratio))
        outcome = DASH if left is None else units.ratio(left)
        return Comparison(label, show(before.get(key)), show(after.get(key)), outcome, left)

    speedup = finite(ratios.get("speedup"))
    outcome = DASH
    if speedup is not None:
        change = "the speed" if speedup < 1 or _around_one(ratios) else "faster"
        outcome = f"{units.ratio(speedup)}× {change}{interval(ratios)}"
    lines = [
        line("Parameters", "parameters", "parameters", lambda value: units.count(value, 4)),
        line("MACs", "macs", "macs", lambda value: units.count(value, 4)),
        line("Size", "size_bytes", "size", units.size),
        Comparison(
            "Median latency",
            units.latency(before.get("latency_ms")),
            units.latency(after.get("latency_ms")),
            outcome,
            1 / speedup if speedup else None,
        ),
    ]
    held = [finite(state.get("session_rss_bytes")) for state in (before, after)]
    if held[0] and held[1] is not None:
        share = held[1] / held[0]
        lines.insert(
            3, Comparison("Loaded memory", units.size(held[0]), units.size(held[1]), units.ratio(share), share)
        )
    metric = report.get("metric") or {}
    old, new = metric.get("before", before.get("metric")), metric.get("after", after.get("metric"))
    if finite(old) is not None or finite(new) is not None:
        lines.append(
            Comparison(
                plain(metric.get("name", "Metric")),
                units.significant(old, 4),
                units.significant(new, 4),
                units.change(metric.get("relative_drop")),
                None,
            )
        )
    return lines


def decibels(value: Any) -> str:
    """Return a signal-to-noise ratio: 27.4 dB."""
    return DASH if finite(value) is None else f"{value:.1f}{NBSP}dB"


def similarity(value: Any) -> str:
    """Return a cosine with digits enough to tell it from 1."""
    number = finite(value)
    if number is None:
        return DASH
    return f"{number:.4f}" if number < 0.9999 else f"{number:.6f}"


def fidelity(report: Mapping[str, Any]) -> str:
    """Return one sentence on how near the new outputs are to the old ones."""
    measured = report.get("fidelity") or {}
    shown = [
        ("cosine {}", "cosine", similarity),
        ("SQNR {}", "sqnr_db", decibels),
        ("largest absolute error {}", "max_abs_error", units.significant),
        ("same arg-max {}", "agreement", lambda value: units.percent(value, 3)),
    ]
    parts = [text.format(show(measured[key])) for text, key, show in shown if finite(measured.get(key)) is not None]
    if not parts:
        return "Fidelity to the original was not measured."
    where = {"evaluate": " on the evaluation data", "calibrate": " on the calibration data"}
    return f"Fidelity to the original{where.get(measured.get('data') or '', '')}: {', '.join(parts)}."


def errors_are_output(report: Mapping[str, Any]) -> bool:
    """Tell whether layer errors are output errors on data; where the report does not say, look at them."""
    said = (report.get("data") or {}).get("errors")
    if said in ("output", "weight"):
        return bool(said == "output")
    return any(finite(site.get("output_error")) is not None for site in report["sites"])


def errors(report: Mapping[str, Any]) -> str:
    """Return one sentence on what the errors of the layers are."""
    if not errors_are_output(report):
        return "Layer errors are weight errors (relative Frobenius norm): no calibration data was used."
    samples = (report.get("data") or {}).get("samples")
    used = f" ({units.plural(samples, 'sample')})" if samples else ""
    return f"Layer errors are relative errors of the layer's output on the calibration data{used}."


def metric_samples(report: Mapping[str, Any]) -> str | None:
    """Return one sentence on how many samples the metric saw, or None without a metric."""
    metric = report.get("metric") or {}
    if not metric.get("samples"):
        return None
    return f"{plain(metric['name'])} over {units.plural(metric['samples'], 'sample')}; its change is relative."


def chains(sites: Iterable[Mapping[str, Any]]) -> str:
    """Return one sentence on how far the chains of sampled layers have converged; empty where nothing was sampled."""
    found = [site["diagnostics"] for site in sites if site.get("diagnostics")]
    if not found:
        return ""
    least = min(entry["effective_samples"] for entry in found)
    return (
        f"{units.plural(len(found), 'layer')} sampled, {found[0]['samples']} samples each: split R-hat at most "
        f"{max(entry['r_hat'] for entry in found):.3f}, worth at least {least:.0f} independent samples."
    )


def environment(report: Mapping[str, Any]) -> str:
    """Return where latency was measured, in one line."""
    where = report.get("environment") or {}
    threads = where.get("threads")
    parts = [
        f"onnxruntime {plain(where['onnxruntime'])}" if where.get("onnxruntime") else None,
        plain(where["provider"]) if where.get("provider") else None,
        plain(where["device"]) if where.get("device") else None,
        units.plural(threads, "thread") if threads else None,
    ]
    return ", ".join(part for part in parts if part)


def factorized(sites: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the sites that were factorized, in the order of the graph."""
    return [site for site in sites if site.get("decision") == "factorized"]


def components(sites: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return, for every site with named components, its name and one line of names for each component."""
    return [
        (plain(site["name"]), [", ".join(plain(row["name"]) for row in entry["rows"]) for entry in site["components"]])
        for site in sites
        if site.get("components")
    ]


def by_reason(sites: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the reasons for layers left alone with the layers' names, the most frequent first."""
    groups: dict[str, list[str]] = {}
    for site in sites:
        groups.setdefault(plain(site.get("reason") or "no reason given"), []).append(plain(site["name"]))
    return sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))


def quantity(sites: Iterable[Mapping[str, Any]]) -> str:
    """Return what layers are compared by: ``macs`` where any layer has them, else ``parameters``."""
    return "macs" if any(finite(site.get("macs_before", site.get("macs"))) for site in sites) else "parameters"
