"""Plans as files: readable, editable, checked against the model before they are carried out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_onnx.base import Plan, Site
from lowrank_onnx.errors import PlanError
from lowrank_onnx.version import __version__

FORMAT = 1


def plan_to_dict(plan: Plan, sites: Sequence[Site]) -> dict[str, Any]:
    """Return the plan as JSON has it: one entry per site, in the order of the model.

    A compound site that was chosen stands for the sites it covers.
    """
    chosen = {entry.site: entry for entry in plan.choices}
    covered = {name for site in sites if site.name in chosen for name in site.parts}
    rows = []
    for site in sites:
        row: dict[str, Any] = {"site": site.name, "kind": site.kind, "op": site.op, "shape": list(site.shape)}
        if site.name in chosen:
            entry = chosen[site.name]
            row |= {
                "decision": "factorized",
                "technique": entry.technique,
                "ranks": list(entry.ranks),
                "parameters": entry.parameters,
                "macs": entry.macs,
                "weight_error": entry.weight_error,
                "output_error": entry.output_error,
            }
            if entry.options:
                row["options"] = dict(entry.options)
            if entry.diagnostics:
                row["diagnostics"] = dict(entry.diagnostics)
            if site.parts:
                row["covers"] = list(site.parts)
        elif site.parts or site.name in covered:
            continue
        else:
            row |= {"decision": "kept", "reason": plan.refusals.get(site.name, "kept by hand")}
            if site.name in plan.refits:
                row["refit"] = True
        rows.append(row)
    return {
        "lowrank_onnx_plan": FORMAT,
        "version": __version__,
        "model": plan.model,
        "setting": dict(plan.setting),
        "sites": rows,
    }


def read_plan(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a plan file; what it names is checked when it is applied.

    Raises:
        PlanError: There is no such file, or it is no plan.
    """
    file = Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"plan '{file}' cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise PlanError(f"plan '{file}' is not JSON: {error}; make one with lowrank-onnx plan") from error
    return check_plan(content, f"'{file}'")


def check_plan(content: Any, what: str) -> dict[str, Any]:
    """Return the content if it has the form of a plan.

    Raises:
        PlanError: It has not.
    """
    if not isinstance(content, dict) or content.get("lowrank_onnx_plan") != FORMAT:
        raise PlanError(f"{what} is no plan of format {FORMAT}; make one with lowrank-onnx plan")
    if not isinstance(content.get("sites"), list) or not isinstance(content.get("setting"), dict):
        raise PlanError(f"{what} lacks its 'sites' or its 'setting'; make one with lowrank-onnx plan")
    return content


def check_model(content: Mapping[str, Any], digest: str) -> None:
    """Refuse a plan of another model, or one whose setting cannot be read.

    Raises:
        PlanError: The digests differ, or an entry of ``setting`` has the wrong form.
    """
    _check_setting(content["setting"])
    if content.get("model") != digest:
        raise PlanError(
            f"the plan was made for a model with digest {str(content.get('model'))[:12]}…, this one has "
            f"{digest[:12]}…; make a plan for this model with lowrank-onnx plan"
        )


def _check_setting(setting: Mapping[str, Any]) -> None:
    data = setting.get("calibrate")
    techniques = setting.get("techniques", [])
    forms = {
        "seed": (type(setting.get("seed", 0)) is int, "a whole number"),
        "target": (isinstance(setting.get("target", {}), dict), "an object such as {'keep_macs': 0.5}"),
        "provider": (isinstance(setting.get("provider", "cpu"), str), "a name"),
        "augment": (isinstance(setting.get("augment", True), bool), "true or false"),
        "mask": (isinstance(setting.get("mask"), str | None), "the name of an input, or null"),
        "techniques": (
            isinstance(techniques, list) and all(isinstance(entry, str) for entry in techniques),
            "a list of techniques as --technique takes them",
        ),
        "calibrate": (
            data is None
            or (isinstance(data, dict) and all(isinstance(data.get(k), str) for k in ("source", "sha256"))),
            "null, or an object with the texts 'source' and 'sha256'",
        ),
    }
    for name, (fits, expected) in forms.items():
        if not fits:
            raise PlanError(f"'{name}' in the setting of the plan must be {expected}, found {setting[name]!r}")


def chosen_rows(content: Mapping[str, Any], sites: Mapping[str, Site]) -> list[Mapping[str, Any]]:
    """Return the rows of a plan that change something.

    Raises:
        PlanError: The plan names a site the model lacks, rewrites one twice, or a row is malformed.
    """
    rows: list[Mapping[str, Any]] = []
    covered: dict[str, str] = {}
    for row in content["sites"]:
        if not isinstance(row, dict) or not isinstance(row.get("site"), str):
            raise PlanError(f"a row of the plan names no site: {str(row)[:80]}")
        name = row["site"]
        decision = row.get("decision")
        if name not in sites:
            raise PlanError(f"plan names site '{name}', which the model lacks; was the plan made for another model?")
        if decision not in ("factorized", "kept"):
            raise PlanError(f"decision of site '{name}' must be 'factorized' or 'kept', found {decision!r}")
        if decision == "kept":
            continue
        ranks = row.get("ranks")
        if not isinstance(ranks, list) or not ranks or not all(type(r) is int and r > 0 for r in ranks):
            raise PlanError(f"ranks of site '{name}' must be a list of positive whole numbers, found {ranks!r}")
        for single in sites[name].covers:
            if single in covered:
                raise PlanError(f"plan rewrites '{single}' twice, by '{covered[single]}' and by '{name}'")
            covered[single] = name
        rows.append(row)
    return rows
