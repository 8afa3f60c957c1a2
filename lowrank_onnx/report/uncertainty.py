"""How sure a result is, in words and rows; the terminal and the page show the same."""

from collections.abc import Mapping
from typing import Any

from lowrank_onnx.report import units
from lowrank_onnx.report.units import DASH, finite, plain

HEADERS = ("Layer", "Technique", "Codes", "Rows", "Factor ±", "Residual, fitted", "Residual, held out")

MEANING = (
    "Factor ± is the expected error of the factor that calibration data leave open, relative to it. The residual is "
    "the error of the layer's output relative to its spread: on the samples the factors were fitted to, and on others."
)


def sentences(report: Mapping[str, Any]) -> list[str]:
    """Return what the predicted deviation of each output is worth, and what it costs."""
    section = report.get("uncertainty") or {}
    told = []
    for row in section.get("outputs") or ():
        where, figures = ("evaluation", row["evaluate"]) if row.get("evaluate") else ("held-out", row["held_out"])
        told.append(
            f"{plain(row['stddev'])}: predicted deviation {units.significant(figures['predicted'])}, real deviation "
            f"{units.significant(figures['deviation'])}; {units.percent(figures['within_two'], 3)} of the elements "
            f"within two predicted deviations, rank correlation {figures['rank_correlation']:.2f} over samples, "
            f"{figures['rank_correlation_elements']:.2f} over elements, on "
            f"{units.plural(figures['samples'], f'{where} sample')}."
        )
    if told:
        factor = finite(section.get("latency_factor"))
        took = "" if factor is None else f", and a run takes {factor:.2f} times as long as without"
        told.append(f"The added outputs hold {units.count(section['parameters'])} parameters{took}.")
    if section:
        held = units.plural(section["held_out_samples"], "calibration sample")
        told.append(f"{held} took no part in the fit, to tell this.")
    return told


def layers(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row of ``HEADERS`` for every layer with a posterior."""
    section = report.get("uncertainty") or {}
    return [
        (
            plain(row["name"]),
            plain(row["technique"]),
            units.count(row["codes"]),
            units.count(row["rows"]),
            DASH if finite(row["factor_spread"]) is None else units.percent(row["factor_spread"]),
            units.percent(row["residual_fitted"]),
            units.percent(row["residual"]),
        )
        for row in section.get("layers") or ()
    ]


def without(report: Mapping[str, Any]) -> list[str]:
    """Return a sentence for every layer that has no posterior."""
    section = report.get("uncertainty") or {}
    return [f"{plain(name)}: {plain(reason)}." for name, reason in (section.get("without") or {}).items()]
