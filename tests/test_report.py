"""Reports: the schema holds, nothing a model is named can break a page, and null is welcome everywhere."""

import copy
import html.parser
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from lowrank_onnx import report as reports
from lowrank_onnx.errors import LowRankError
from lowrank_onnx.report import plots, terminal, units, wording

SCHEMA = json.loads(Path(reports.__file__).with_name("schema.json").read_text(encoding="utf-8"))

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=https://example.org/x onerror=alert(1)>',
    "$\\frac{1$ </svg><script>",
    "\x1b[31mred\x1b[0m\r\nnext line",
    "\u202eright to left",
    "[bold red]markup[/]",
    "層/エンコーダ/重み" * 20,
    "/very/long" * 60,
    "{{ 7 * 7 }}",
    "lone \udc80 surrogate",
    "",
)


def site(name: str, kept: bool = False) -> dict[str, Any]:
    sigma = np.geomspace(1, 1e-3, 64)
    return {
        "name": name,
        "kind": "linear",
        "op": "MatMul",
        "shape": [768, 3072],
        "decision": "kept" if kept else "factorized",
        "technique": None if kept else "whitened_svd",
        "ranks": None if kept else [32],
        "reason": "weight is shared by 2 nodes" if kept else None,
        "weight_error": None if kept else 0.2,
        "output_error": None if kept else 0.041,
        "parameters_before": 2359296,
        "parameters_after": 2359296 if kept else 122880,
        "macs_before": 301989888,
        "macs_after": 301989888 if kept else 15728640,
        "latency_before_us": 512.0,
        "latency_after_us": 512.0 if kept else 101.5,
        "spectrum": {"values": sigma.tolist(), "index": list(range(1, 65)), "kind": "whitened"},
        "damage": {"ranks": [8, 16, 32], "values": [0.1, 0.02, 0.003]},
    }


def report_of(sites: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "schema": 1,
        "version": "0.1.0",
        "model": {"path": "model.onnx", "sha256": "ab" * 32, "opset": 17},
        "target": {"keep_macs": 0.55},
        "environment": {
            "onnxruntime": "1.22.0",
            "provider": "CPUExecutionProvider",
            "device": "a processor",
            "threads": 4,
            "versions": {"numpy": "2.0"},
        },
        "before": {
            "parameters": 109_482_240,
            "macs": 11_173_000_000,
            "size_bytes": 438_012_345,
            "latency_ms": {"median": 41.23, "iqr": 1.12, "runs": 60},
            "metric": 0.84,
        },
        "after": {
            "parameters": 60_215_232,
            "macs": 6_145_150_000,
            "size_bytes": 240_906_789,
            "latency_ms": {"median": 22.9, "iqr": 0.61, "runs": 60},
            "metric": 0.83664,
        },
        "ratio": {
            "parameters": 0.55,
            "macs": 0.55,
            "size": 0.55,
            "speedup": 1.8,
            "speedup_low": 1.72,
            "speedup_high": 1.89,
        },
        "metric": {"name": "top1", "before": 0.84, "after": 0.83664, "relative_drop": 0.004, "samples": 500},
        "fidelity": {
            "cosine": 0.9987,
            "sqnr_db": 26.41,
            "max_abs_error": 0.41,
            "agreement": 0.987,
            "data": "evaluate",
        },
        "seconds": {"total": 93.2, "observe": 21.3, "validate": 71.9},
        "peak_rss_bytes": 2**31,
        "data": {
            "calibrate": "data.npz",
            "evaluate": None,
            "samples": 64,
            "errors": "output",
            "note": "Held out 20 %.",
        },
        "warnings": ["few samples"],
        "argv": "lowrank-onnx compress model.onnx -o small.onnx",
        "sites": sites,
    }


def null_report() -> dict[str, Any]:
    """Return a report with null, or nothing, wherever the schema allows it."""
    bare = report_of([site("a"), site("b", kept=True)])
    for state in ("before", "after"):
        bare[state].update(macs=None, latency_ms=None, metric=None)
    bare["ratio"].update(macs=None, speedup=None, speedup_low=None, speedup_high=None)
    bare.update(metric=None, fidelity=None, target={}, peak_rss_bytes=0, seconds={"total": 0})
    for key in ("data", "warnings", "argv"):
        del bare[key]
    del bare["environment"]["versions"]
    required = set(SCHEMA["properties"]["sites"]["items"]["required"])
    first, second = bare["sites"]
    bare["sites"] = [
        {key: first[key] for key in required} | {"technique": None, "ranks": None, "shape": []},
        second | dict.fromkeys(set(second) - required) | {"reason": None},
    ]
    return bare


def inspection_of(full: dict[str, Any]) -> dict[str, Any]:
    sites = [
        {
            "name": layer["name"],
            "kind": layer["kind"],
            "op": layer["op"],
            "shape": layer["shape"],
            "parameters": layer["parameters_before"],
            "macs": layer.get("macs_before"),
            "reason": layer["reason"],
            "techniques": [] if layer["reason"] else ["svd"],
            "break_even_rank": None if layer["reason"] else 614,
            "rank_90": None if layer["reason"] else 120,
            "rank_99": 301,
            "effective_rank": None if layer["reason"] else 212.3,
            "spectrum": layer.get("spectrum"),
        }
        for layer in full["sites"]
    ]
    before = full["before"] | {"latency_ms": None, "metric": None}
    return {key: full[key] for key in ("schema", "version", "model")} | {"before": before, "sites": sites}


def frontier_of(names: list[str]) -> dict[str, Any]:
    point = {
        "keep": 0.5,
        "macs_ratio": 0.5,
        "parameters_ratio": 0.52,
        "size_ratio": 0.52,
        "speedup": 1.8,
        "speedup_low": 1.7,
        "speedup_high": 1.9,
        "metric_drop": 0.004,
        "cosine": 0.99,
        "sqnr_db": 27.0,
        "file": "half.onnx",
    }
    points = [point | {"label": name, "speedup": 1 + 0.1 * place} for place, name in enumerate(names)]
    return {
        "model": "model.onnx",
        "points": points,
        "reference": [dict.fromkeys(point) | {"label": "original", "speedup": 1.0, "metric_drop": 0.0}],
    }


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "full": lambda: report_of([site(f"/layer.{n}/MatMul", kept=n % 5 == 0) for n in range(12)]),
    "null": null_report,
    "empty": lambda: report_of([]),
    "one": lambda: report_of([site("only")]),
    "all kept": lambda: report_of([site("only", kept=True)]),
    "huge": lambda: report_of([site(f"/block.{n}/attention/query/MatMul", kept=n % 3 == 0) for n in range(500)]),
    "hostile": lambda: report_of([site(name, kept=place % 2 == 1) for place, name in enumerate(HOSTILE * 2)]),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CASES[request.param]()


def printed(render: Callable[[Any, Console], None], value: Any, width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    render(value, Console(file=stream, width=width))
    stream.flush()
    return raw.getvalue().decode(encoding)


class Page(html.parser.HTMLParser):
    """Collects tags, references and text the way a browser sees them, and holds tags to their nesting."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"tags left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(write: Callable[[Any, Path], None], value: Any, folder: Path) -> Page:
    path = folder / "page.html"
    write(value, path)
    text = path.read_text(encoding="utf-8")
    assert "url(" not in re.sub(r"url\(#[^)]*\)", "", text), "the page asks for something outside it"
    assert "@import" not in text
    page = Page(text)
    assert not page.tags & {"script", "img", "link", "iframe", "object", "metadata"}
    assert not page.handlers
    assert all(reference.startswith("#") for reference in page.references)
    return page


def test_schema_accepts_what_it_describes(case: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(case, SCHEMA)


def test_schema_refuses_a_missing_decision() -> None:
    broken = report_of([site("a")])
    del broken["sites"][0]["decision"]
    with pytest.raises(jsonschema.ValidationError, match="'decision' is a required property"):
        jsonschema.validate(broken, SCHEMA)


def test_json_comes_back_as_it_was(case: dict[str, Any], tmp_path: Path) -> None:
    before = copy.deepcopy(case)
    reports.write_json(case, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == before == case


def test_json_takes_numpy_and_turns_what_is_not_finite_into_null(tmp_path: Path) -> None:
    report = report_of([site("a")])
    report["fidelity"].update(cosine=np.float32(0.5), sqnr_db=float("inf"), agreement=np.float64("nan"))
    report["sites"][0].update(shape=np.array([3, 4]), ranks=(np.int64(2),))
    reports.write_json(report, tmp_path / "report.json")
    back = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert (back["fidelity"]["cosine"], back["fidelity"]["sqnr_db"], back["fidelity"]["agreement"]) == (0.5, None, None)
    assert (back["sites"][0]["shape"], back["sites"][0]["ranks"]) == ([3, 4], [2])
    jsonschema.validate(back, SCHEMA)


def test_json_keys_follow_the_schema_whatever_order_they_came_in(tmp_path: Path) -> None:
    report = report_of([site("a")]) | {"zeta": 1, "alpha": 2}
    reports.write_json(report, tmp_path / "a.json")
    reports.write_json(dict(reversed(report.items())), tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    keys = list(json.loads((tmp_path / "a.json").read_text(encoding="utf-8")))
    known = [key for key in SCHEMA["properties"] if key in report]
    assert keys == [*known, "alpha", "zeta"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError, ValueError])
@pytest.mark.parametrize("write", [reports.write_json, reports.write_html])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    write: Callable[[Any, Path], None],
    failure: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "report"
    path.write_text("old")

    def fail(self: Path, target: Path) -> None:
        assert self.stat().st_size > 0  # in the middle: the text is there, the rename is not
        raise failure("planted")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(LowRankError if failure is OSError else failure):
        write(report_of([]), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report"]
    assert path.read_text() == "old"


def test_a_folder_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(LowRankError, match=r"cannot write the report '.*': No such file") as raised:
        reports.write_json({}, tmp_path / "missing" / "report.json")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_terminal_stays_in_its_width_without_codes(case: dict[str, Any], width: int, encoding: str) -> None:
    for render, value in (
        (reports.render_terminal, case),
        (reports.render_inspection, inspection_of(case)),
    ):
        text = printed(render, value, width, encoding)
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert max(map(cell_len, text.split("\n"))) <= width


def test_terminal_tells_the_result() -> None:
    text = printed(reports.render_terminal, CASES["full"]())
    assert "0.55 of the MACs, 1.80 times faster (1.72–1.89), top1 −0.40 %." in text
    assert re.search(
        r"Median latency +41\.2 ms \(IQR 1\.1\) +22\.9 ms \(IQR 0\.61\) +1\.80× faster \(1\.72–1\.89\)", text
    )
    assert re.search(r"/layer\.1 +MatMul +768×3072 +whitened_svd +32 +4\.1 % +302M→15\.7M", text)
    assert re.search(r"/layer\.0 +MatMul +768×3072 +kept +302M", text)
    assert re.search(r"3 +weight is shared by 2 nodes: /layer\.0/MatMul", text)
    assert "output on the calibration data (64 samples)" in " ".join(text.split())


def test_terminal_says_when_no_data_was_used() -> None:
    report = null_report()
    report["sites"][0]["weight_error"] = 0.25
    text = printed(reports.render_terminal, report)
    assert "weight errors (relative Frobenius norm): no calibration data was used" in " ".join(text.split())
    assert "25 %" in text


def test_terminal_marks_a_weight_error_among_output_errors() -> None:
    report = report_of([site("a"), site("b")])
    report["sites"][1]["output_error"] = None
    text = printed(reports.render_terminal, report)
    assert "20 %*" in text
    assert "* weight error" in text


def test_terminal_summarises_many_layers() -> None:
    text = printed(reports.render_terminal, CASES["huge"]())
    assert "333 of 500 layers factorized" in text
    assert len(re.findall(r"whitened_svd", text)) == terminal.ROWS
    assert "and 293 more factorized" in text
    assert re.search(r"167 +weight is shared", text)


def test_shortened_names_keep_what_tells_them_apart() -> None:
    front = [f"/encoder/layer.{n}/" + "x" * 40 for n in range(9)]
    back = ["/encoder/" + "x" * 40 + f"/proj.{n}" for n in range(9)]
    for names in (front, back):
        shortened = terminal.shorten(names, 24)
        assert len(set(shortened)) == len(names)
        assert all(cell_len(name) <= 24 for name in shortened)


def test_page_is_safe_and_whole(case: dict[str, Any], tmp_path: Path) -> None:
    page = page_of(reports.write_html, case, tmp_path)
    for layer in case["sites"]:
        assert units.plain(layer["name"]) in page.text
    assert wording.headline(case) in page.text
    assert case["model"]["sha256"] in page.text


def test_inspection_page_is_safe_and_whole(case: dict[str, Any], tmp_path: Path) -> None:
    page = page_of(reports.write_inspection_html, inspection_of(case), tmp_path)
    for layer in case["sites"]:
        assert units.plain(layer["name"]) in page.text


def test_hostile_strings_outside_the_layers_stay_text(tmp_path: Path) -> None:
    for bad in HOSTILE:
        report = report_of([site("a") | {"op": bad, "technique": bad}, site("b", kept=True) | {"reason": bad}])
        report["model"].update(path=bad, sha256=bad)
        report["environment"].update(device=bad, versions={bad: bad})
        report["metric"]["name"] = bad
        report.update(argv=bad, warnings=[bad], version=bad, target={bad: bad}, seconds={bad: 1.0, "total": 2.0})
        report["data"].update(note=bad, calibrate=bad, evaluate=bad)
        page = page_of(reports.write_html, report, tmp_path)
        assert units.plain(bad) in page.text
        assert max(map(cell_len, printed(reports.render_terminal, report).split("\n"))) <= 80


def test_page_shows_at_most_so_many_spectra_and_counts_the_rest(tmp_path: Path) -> None:
    reports.write_html(CASES["huge"](), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<svg") == 48  # 24 spectra, 24 sensitivity curves
    assert "those of 476 more layers are in the JSON report" in text
    assert "other 440 layers are in the table" in text


def test_page_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        reports.write_html(CASES["full"](), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_chosen_rank_is_a_line_at_its_place() -> None:
    curve = plots.curve(range(1, 65), np.geomspace(1, 1e-3, 64).tolist(), [32, 999, None])
    assert curve is not None
    assert curve.marks == (32,)
    (svg,) = plots.small_multiples([curve], scale_each=True)
    line = re.search(r'd="M ([\d.]+) [\d.]+ \nL \1 [\d.]+ ?\n?" [^>]*stroke: var\(--mark\)', svg)
    assert line is not None
    left, width = 180 * 0.19, 180 * 0.77  # the axes inside the panel
    assert abs(float(line[1]) - (left + width * 31 / 63)) < 0.01


def test_curve_leaves_out_what_a_logarithm_cannot_show() -> None:
    curve = plots.curve([1, 2, 3, 4], [1.0, 0.0, float("nan"), 0.1])
    assert curve == plots.Curve((1, 4), (1.0, 0.1), ())
    assert plots.curve([1, 2], [0.0, None]) is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("names", [["keep 0.5", "keep 0.3"], ["one"], [], list(HOSTILE)])
def test_frontier_page(names: list[str], tmp_path: Path) -> None:
    page = page_of(reports.write_frontier_html, frontier_of(names), tmp_path)
    for name in names:
        assert units.plain(name) in page.text
    assert ("svg" in page.tags) == bool(names)


@pytest.mark.parametrize("quality", ["sqnr_db", "cosine", None])
def test_frontier_falls_back_to_fidelity(quality: str | None, tmp_path: Path) -> None:
    frontier = frontier_of(["a", "b"])
    for point in frontier["points"]:
        point.update(dict.fromkeys(["metric_drop", "cosine", "sqnr_db"]) | ({quality: 1.0} if quality else {}))
    page = page_of(reports.write_frontier_html, frontier, tmp_path)
    assert ("SQNR against the original, dB" in page.text) == (quality == "sqnr_db")
    assert ("Cosine to the original" in page.text) == (quality == "cosine")
    assert ("svg" in page.tags) == (quality is not None)


def test_report_with_a_frontier_shows_it(tmp_path: Path) -> None:
    report = CASES["one"]() | {"frontier": frontier_of(["keep 0.5"])}
    jsonschema.validate(report, SCHEMA)
    assert "Quality against speed" in page_of(reports.write_html, report, tmp_path).text


def test_a_speed_that_did_not_change_is_called_neither_faster_nor_slower() -> None:
    report = report_of([site("a")])
    for low, high, said in ((0.998, 1.004, "1.01× the speed (1.00–1.00)"), (1.2, 1.3, "1.01× faster (1.20–1.30)")):
        report["ratio"].update(speedup=1.01, speedup_low=low, speedup_high=high)
        assert said in [line.outcome for line in wording.comparisons(report)]


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        ((1.8, 1.72, 1.89), "1.80 times faster (1.72–1.89)"),
        ((1.02, 0.97, 1.06), "no measurable change in speed (0.97–1.06)"),
        ((0.996, 0.991, 0.999), "no measurable change in speed (0.99–1.00)"),
        ((0.8, 0.78, 0.83), "slower, at 0.80 of the speed (0.78–0.83)"),
        ((1.5, None, None), "1.50 times faster"),
        ((None, None, None), None),
    ],
)
def test_speed_is_told_with_its_interval(ratio: tuple[float | None, ...], said: str | None) -> None:
    keys = ("speedup", "speedup_low", "speedup_high")
    assert wording.speed({"ratio": dict(zip(keys, ratio, strict=True))}) == said


def test_a_comparison_of_two_models_speaks_of_no_layers(tmp_path: Path) -> None:
    report = CASES["empty"]() | {"candidate": {"path": "other.onnx", "sha256": "cd" * 32, "opset": 17}, "target": {}}
    jsonschema.validate(report, SCHEMA)
    for text in (printed(reports.render_terminal, report), page_of(reports.write_html, report, tmp_path).text):
        assert "Compared with other.onnx." in text
        assert "0.55 of the MACs, 1.80 times faster" in text
        assert "actorize" not in text
        assert "Layer errors" not in text


def test_headline_leads_with_what_the_target_names() -> None:
    report = CASES["one"]() | {"target": {"keep_size": 0.6}, "metric": None}
    assert wording.headline(report).startswith("0.55 of the file size")
    assert wording.headline(report).endswith("SQNR 26.4\u00a0dB against the original.")
    report["fidelity"] = None
    assert wording.headline(report).endswith("quality not measured.")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0, "0"),
        (999, "999"),
        (590_000, "590k"),
        (999_600, "1.00M"),
        (11.17e9, "11.2G"),
    ],
)
def test_counts(value: float | None, said: str) -> None:
    assert units.count(value) == said


@pytest.mark.parametrize(
    ("drop", "said"), [(0.00395, "−0.40 %"), (-0.02, "+2.00 %"), (0.0, "unchanged"), (None, "–"), (0.5, "−50.0 %")]
)
def test_changes_are_signed_so_that_minus_is_worse(drop: float | None, said: str) -> None:
    assert units.change(drop).replace("\u00a0", " ") == said


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.314, "0.31 s"), (12.34, "12.3 s"), (192, "3 min 12 s"), (3840, "1 h 04 min")]
)
def test_durations(seconds: float, said: str) -> None:
    assert units.duration(seconds).replace("\u00a0", " ") == said
