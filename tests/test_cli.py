"""The command line: exit status, one-line errors, and that nothing is left where something went wrong."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import ModelProto

import lowrank_onnx
import lowrank_onnx.report as report_package
from lowrank_onnx.cli import main
from lowrank_onnx.passes import PASSES
from tests.builders import answers, build, correlated, falling, furthest
from tests.conftest import REPOSITORY

CLI = [sys.executable, "-m", "lowrank_onnx.cli"]
SCHEMA = json.loads((Path(report_package.__file__).parent / "schema.json").read_text())

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a command in a folder of its own: exit status, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lowrank-onnx", *arguments])
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as stop:
            assert isinstance(stop.code, int | None)
            status = stop.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, data that fit it, and nothing else."""
    onnx.save(small(), tmp_path / "m.onnx")
    np.savez(tmp_path / "c.npz", x=correlated((40, 32)))
    np.savez(tmp_path / "e.npz", x=correlated((20, 32), seed=7), labels=np.arange(20) % 5)
    return tmp_path


def small() -> ModelProto:
    return build(
        "g (float[n,32] x) => (float[n,5] y) { t = MatMul(x, w) u = Add(t, b) h = Relu(u) y = Gemm(h, v) }",
        {"w": falling(32, 48), "b": np.ones(48, np.float32), "v": falling(48, 5, seed=1)},
    )


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_refused(run: Run, folder: Path, *arguments: str, status: int = 1, says: str = "") -> None:
    """One line on standard error, the exit status, no file more or less, and the inputs as they were."""
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    found, out, err = run(*arguments)
    assert found == status, err
    assert err.startswith("Error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err and len(err) < 800
    assert says.lower() in err.lower(), err
    assert out == ""
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


# --- what goes well ----------------------------------------------------------------------------------


def test_compress_writes_model_and_reports(run: Run, folder: Path) -> None:
    status, out, err = run(
        "compress", "m.onnx", "-o", "out.onnx", "--keep-macs", "0.7", "--calibrate", "c.npz", "--evaluate", "e.npz",
        "--metric", "top1", "--report", "r.html", "--json", "r.json", "--threads", "1",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "out.onnx" in out
    assert files(folder) == {"m.onnx", "c.npz", "e.npz", "out.onnx", "r.html", "r.json"}
    report = json.loads((folder / "r.json").read_text())
    jsonschema.validate(report, SCHEMA)
    assert report["ratio"]["macs"] <= 0.7
    steps = {"total", "observe", "propose", "allocate", "rewrite", "refine", "validate"}
    assert steps <= set(report["seconds"])
    assert report["environment"]["threads"] == 1
    assert report["after"]["size_bytes"] == (folder / "out.onnx").stat().st_size
    page = (folder / "r.html").read_text()
    assert "<html" in page and "http://" not in page.replace("http://www.w3.org", "")
    feeds = {"x": correlated((3, 32))}
    assert list(answers(onnx.load(folder / "out.onnx"), feeds)) == ["y"]


def test_same_seed_same_bytes_and_overwrite_is_asked_for(run: Run, folder: Path) -> None:
    command = ["compress", "m.onnx", "-o", "out.onnx", "--keep-params", "0.6", "--calibrate", "c.npz", "--seed", "3"]
    assert run(*command)[0] == 0
    first = (folder / "out.onnx").read_bytes()
    assert_refused(run, folder, *command, says="--overwrite")
    assert run(*command, "--overwrite")[0] == 0
    assert (folder / "out.onnx").read_bytes() == first


def test_weight_only_says_so(run: Run, folder: Path) -> None:
    assert run("compress", "m.onnx", "-o", "out.onnx", "--rank", "4", "--json", "r.json")[0] == 0
    report = json.loads((folder / "r.json").read_text())
    assert report["data"]["errors"] == "weight" and "no calibration data" in report["data"]["note"]


def test_every_site_has_a_decision_and_every_kept_one_a_reason(run: Run, folder: Path) -> None:
    arguments = ["--exclude", "Gemm*", "--json", "r.json", "--calibrate", "c.npz"]
    assert run("compress", "m.onnx", "-o", "out.onnx", "--rank", "4", *arguments)[0] == 0
    rows = {row["name"]: row for row in json.loads((folder / "r.json").read_text())["sites"]}
    assert {name: row["decision"] for name, row in rows.items()} == {"MatMul_0": "factorized", "Gemm_3": "kept"}
    assert "--exclude" in rows["Gemm_3"]["reason"]


def test_inspect(run: Run, folder: Path) -> None:
    status, out, err = run("inspect", "m.onnx", "--calibrate", "c.npz", "--json", "i.json", "--html", "i.html")
    assert (status, err) == (0, "") and "MatMul_0" in out
    report = json.loads((folder / "i.json").read_text())
    assert "svd (2), feedforward (1)" in out and [row["techniques"] for row in report["blocks"]] == [["feedforward"]]
    assert report["target"] == {} and {row["name"] for row in report["sites"]} >= {"MatMul_0", "Gemm_3"}


def test_validate_and_benchmark(run: Run, folder: Path) -> None:
    assert run("compress", "m.onnx", "-o", "out.onnx", "--rank", "4", "--calibrate", "c.npz")[0] == 0
    status, out, err = run(
        "validate", "m.onnx", "out.onnx", "--evaluate", "e.npz", "--metric", "top1", "--json", "v.json"
    )
    assert (status, err) == (0, "") and out
    jsonschema.validate(json.loads((folder / "v.json").read_text()), SCHEMA)
    status, out, err = run(
        "benchmark", "m.onnx", "out.onnx", "--shape", "x=4,32", "--seconds", "0.2", "--json", "b.json"
    )
    assert (status, err) == (0, "") and "out.onnx" in out
    assert [row["shapes"] for row in json.loads((folder / "b.json").read_text())["models"]] == [{"x": [4, 32]}] * 2


def test_passes_lists_every_technique(run: Run) -> None:
    status, out, _ = run("passes")
    assert status == 0 and all(technique.name in out for technique in PASSES)
    rows = json.loads(run("passes", "--json")[1])
    assert [row["name"] for row in rows] == [technique.name for technique in PASSES]
    assert all(row["reference"] and row["kinds"] and row["summary"] for row in rows)


def test_external_data_travel(run: Run, tmp_path: Path) -> None:
    proto = small()
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    command = ["compress", "m.onnx", "-o", "out.onnx", "--rank", "4", "--include", "MatMul_0"]
    status, out, _ = run(*command)
    assert status == 0 and "out.onnx.data" in out.splitlines()[-1]
    assert files(tmp_path) == {"m.onnx", "m.bin", "out.onnx", "out.onnx.data"}
    (tmp_path / "out.onnx").unlink()
    assert_refused(run, tmp_path, *command, says="out.onnx.data")
    assert run(*command, "--overwrite")[0] == 0
    full = ["compress", "m.onnx", "-o", "full.onnx", "--rank", "1.0", "--technique", "svd"]
    assert run(*full)[0] == 0
    feeds = {"x": correlated((3, 32))}
    assert furthest(answers(onnx.load(tmp_path / "full.onnx"), feeds), answers(small(), feeds)) < 1e-5


# --- bad input ---------------------------------------------------------------------------------------

COMPRESS = ("compress", "m.onnx", "-o", "out.onnx", "--rank", "4")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no model", b"hello\n" * 100, b"\x08\x08"])
def test_not_an_onnx_file(run: Run, folder: Path, content: bytes) -> None:
    (folder / "m.onnx").write_bytes(content)
    assert_refused(run, folder, *COMPRESS, says="m.onnx")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
def test_truncated_file(run: Run, folder: Path, share: float) -> None:
    content = (folder / "m.onnx").read_bytes()
    (folder / "m.onnx").write_bytes(content[: int(share * len(content))])
    assert_refused(run, folder, *COMPRESS, says="m.onnx")


@pytest.mark.parametrize("command", ["inspect", "compress", "plan", "validate", "benchmark", "apply"])
def test_model_that_is_not_there(run: Run, folder: Path, command: str) -> None:
    rest = {"inspect": [], "validate": ["m.onnx"], "benchmark": [], "apply": ["p.json", "-o", "o.onnx"]}
    assert_refused(run, folder, command, "no.onnx", *rest.get(command, ["-o", "o.x", "--rank", "4"]), says="no.onnx")


def test_model_that_is_a_folder(run: Run, folder: Path) -> None:
    assert_refused(run, folder, "inspect", ".", says="no file")


@pytest.mark.parametrize("damage", ["missing", "short", "outside"])
def test_external_data_that_are_not_there(run: Run, tmp_path: Path, damage: str) -> None:
    onnx.save(small(), tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    if damage == "missing":
        (tmp_path / "m.bin").unlink()
    elif damage == "short":
        (tmp_path / "m.bin").write_bytes((tmp_path / "m.bin").read_bytes()[:1000])
    else:
        proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../m.bin"
        (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    assert_refused(run, tmp_path, *COMPRESS, says="external data")


@pytest.mark.parametrize("node", ["h = Nonsense(u)", "h = my.own.Op(u)"])
def test_operator_onnxruntime_does_not_know(run: Run, folder: Path, node: str) -> None:
    proto = build(
        f"g (float[n,32] x) => (float[n,48] h) {{ u = MatMul(x, w) {node} }}", {"w": falling(32, 48)},
        imports=', "my.own": 1',
    )  # fmt: skip
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    assert_refused(run, folder, *COMPRESS, says="onnxruntime does not accept")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weight_that_is_not_finite(run: Run, folder: Path, value: float) -> None:
    weight = falling(32, 48)
    weight[1, 2] = value
    onnx.save(build("g (float[n,32] x) => (float[n,48] y) { y = MatMul(x, w) }", {"w": weight}), folder / "m.onnx")
    assert_refused(run, folder, *COMPRESS, says="1 NaN or Inf")


BAD_DATA = {
    "wrong name": ({"z": correlated((4, 32))}, "'x'"),
    "wrong dtype": ({"x": correlated((4, 32), np.float64)}, "float32"),
    "wrong rank": ({"x": correlated((4, 2, 2, 32))}, "axes"),
    "wrong dimension": ({"x": correlated((4, 31))}, "32"),
    "no samples": ({"x": np.zeros((0, 32), np.float32)}, "0 samples"),
    "nothing": ({}, "no array"),
    "nan": ({"x": np.full((4, 32), np.nan, np.float32)}, "NaN"),
}


@pytest.mark.parametrize("option", ["--calibrate", "--evaluate"])
@pytest.mark.parametrize("kind", BAD_DATA)
def test_data_that_do_not_fit(run: Run, folder: Path, option: str, kind: str) -> None:
    arrays, says = BAD_DATA[kind]
    np.savez(folder / "bad.npz", **arrays)  # type: ignore[arg-type]
    assert_refused(run, folder, *COMPRESS, option, "bad.npz", says=says)


def test_few_samples_are_told_of(run: Run, folder: Path) -> None:
    command = ("compress", "m.onnx", "-o", "out.onnx", "--keep-macs", "0.7", "--json", "r.json", "--overwrite")
    for samples, few in ((4, True), (40, False)):
        np.savez(folder / "c.npz", x=correlated((samples, 32)))
        status, out, err = run(*command, "--calibrate", "c.npz")
        assert (status, err) == (0, "")
        assert ("give more samples" in " ".join(out.split())) == few


def test_data_that_are_not_there_or_no_npz(run: Run, folder: Path) -> None:
    assert_refused(run, folder, *COMPRESS, "--calibrate", "no.npz", says="no.npz")
    (folder / "bad.npz").write_bytes(b"nothing")
    assert_refused(run, folder, *COMPRESS, "--calibrate", "bad.npz", says="bad.npz")
    (folder / "cut.npz").write_bytes((folder / "c.npz").read_bytes()[:500])
    assert_refused(run, folder, *COMPRESS, "--calibrate", "cut.npz", says="damaged")
    (folder / "empty").mkdir()
    assert_refused(run, folder, *COMPRESS, "--calibrate", "empty", says="test_data_set")


METRIC = """
def nan(outputs, data): return float("nan")
def fails(outputs, data): raise RuntimeError("no good\\nat all")
def text(outputs, data): return "good"
def leaves(outputs, data): raise SystemExit(0)
"""


@pytest.mark.parametrize(
    ("metric", "says"),
    [("nothing", "unknown"), ("no.py:f", "no.py"), ("my.py:gone", "no function"), ("my.py:nan", "nan"),
     ("my.py:fails", "no good at all"), ("my.py:text", "number"), ("my.py:leaves", "SystemExit"), ("my.py", "function"),
     ("psnr", "target"), ("perplexity:", "unknown")],
)  # fmt: skip
def test_metric_that_does_not_work(run: Run, folder: Path, metric: str, says: str) -> None:
    (folder / "my.py").write_text(METRIC)
    data = ("--calibrate", "c.npz", "--evaluate", "e.npz")
    assert_refused(run, folder, *COMPRESS, *data, "--metric", metric, says=says)


def test_metric_without_data(run: Run, folder: Path) -> None:
    assert_refused(run, folder, *COMPRESS, "--metric", "top1", says="--evaluate")


@pytest.mark.parametrize("command", ["compress", "plan"])
def test_out_that_is_the_model(run: Run, folder: Path, command: str) -> None:
    os.link(folder / "m.onnx", folder / "hard.onnx")
    (folder / "soft.onnx").symlink_to("m.onnx")
    for out in ("m.onnx", "./m.onnx", str(folder / "m.onnx"), "hard.onnx", "soft.onnx"):
        for more in ((), ("--overwrite",)):
            assert_refused(run, folder, command, "m.onnx", "-o", out, "--rank", "4", *more, says="the model itself")


@pytest.mark.parametrize("option", ["-o", "--report", "--json"])
def test_out_in_a_folder_that_is_not_there(run: Run, folder: Path, option: str) -> None:
    rest = ("-o", "out.onnx") if option != "-o" else ()
    command = ("compress", "m.onnx", "--rank", "4", *rest, option, "gone/out.html")
    assert_refused(run, folder, *command, says="does not exist")


@pytest.mark.parametrize("option", ["-o", "--report", "--json"])
def test_out_that_is_a_folder_or_no_file(run: Run, folder: Path, option: str) -> None:
    (folder / "sub").mkdir()
    rest = ("-o", "out.onnx") if option != "-o" else ()
    command = ("compress", "m.onnx", "--rank", "4", "--overwrite", *rest, option)
    assert_refused(run, folder, *command, "sub", says="folder")
    os.mkfifo(folder / "pipe.json")
    assert_refused(run, folder, *command, "pipe.json", says="no ordinary file")
    assert_refused(run, folder, *command, "/dev/null", says="no ordinary file")


def test_reports_in_the_place_of_inputs_or_of_each_other(run: Run, folder: Path) -> None:
    assert_refused(run, folder, *COMPRESS, "--json", "m.onnx", says="the model itself")
    assert_refused(run, folder, *COMPRESS, "--json", "out.onnx", says="out.onnx")
    assert_refused(run, folder, *COMPRESS, "--json", "r.html", "--report", "./r.html", says="r.html")


def test_a_name_that_is_too_long(run: Run, folder: Path) -> None:
    assert_refused(run, folder, "compress", "m.onnx", "-o", "x" * 300, says="name too long")
    assert_refused(run, folder, "inspect", "x" * 300, says="name too long")
    assert_refused(run, folder, *COMPRESS, "--calibrate", "x" * 300, says="name too long")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_out_in_a_folder_that_cannot_be_written(run: Run, folder: Path) -> None:
    (folder / "locked").mkdir(mode=0o555)
    assert_refused(run, folder, "compress", "m.onnx", "-o", "locked/o.onnx", "--rank", "4", says="cannot be written")


def test_out_in_a_folder_that_no_user_can_write(run: Run, folder: Path) -> None:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("needs /proc")
    assert_refused(run, folder, "compress", "m.onnx", "-o", "/proc/o.onnx", "--rank", "4", says="cannot be written")


PLAN = ("plan", "m.onnx", "-o", "p.json", "--rank", "4", "--calibrate", "c.npz")


def test_plan_of_another_model(run: Run, folder: Path) -> None:
    assert run(*PLAN)[0] == 0
    proto = small()
    proto.doc_string = "another"
    onnx.save(proto, folder / "other.onnx")
    assert_refused(run, folder, "apply", "other.onnx", "p.json", "-o", "out.onnx", says="digest")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"lowrank_onnx_plan": 1}', '{"lowrank_onnx_plan": 2}', "\0", "[" * 100_000],
    ids=["empty", "list", "dict", "format 1", "format 2", "binary", "nested"],
)  # fmt: skip
def test_plan_that_is_none(run: Run, folder: Path, content: str) -> None:
    (folder / "p.json").write_text(content)
    assert_refused(run, folder, "apply", "m.onnx", "p.json", "-o", "out.onnx", says="p.json")


@pytest.mark.parametrize(
    ("target", "best"),
    [(("--keep-macs", "0.01"), "0."), (("--keep-params", "0.001"), "0."), (("--keep-size", "0.001"), "0.")],
)
def test_target_that_cannot_be_met(run: Run, folder: Path, target: tuple[str, ...], best: str) -> None:
    command = ("compress", "m.onnx", "-o", "out.onnx", "--calibrate", "c.npz", *target)
    assert_refused(run, folder, *command, status=3, says=best)
    assert_refused(run, folder, "plan", *command[1:], status=3, says="cannot be met")


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("odd", ["a constant is an output", "a layer of zeros"])
def test_odd_models_that_can_be_compressed(run: Run, folder: Path, odd: str) -> None:
    proto = small()
    if odd == "a constant is an output":
        proto.graph.output.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, (32, 48)))
    else:
        proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.zeros((32, 48), np.float32), "w"))
        del proto.graph.initializer[1], proto.graph.node[1]
        proto.graph.node[1].input[0] = "t"
    onnx.save(proto, folder / "m.onnx")
    for target in (("--keep-macs", "0.97"), ("--keep-params", "0.97")):
        status, _, err = run("compress", "m.onnx", "-o", "out.onnx", "--calibrate", "c.npz", "--overwrite", *target)
        assert (status, err) == (0, "")
    assert set(answers(onnx.load(folder / "out.onnx"), {"x": correlated((3, 32))})) >= {
        value.name for value in proto.graph.output
    }


@pytest.mark.parametrize(
    ("options", "reason"),
    [(("--technique", "cp"), "(2 × no technique in use takes kind linear (in use: cp))"),
     (("--exclude", "*"), "(2 × matched by --exclude)"),
     (("--technique", "svd:multiple=1000"), "(2 × too small: no rank on the grid of svd is below break-even)"),
     (("--technique", "feedforward"), "(feedforward needs calibration data at this site)")],
)  # fmt: skip
def test_why_nothing_can_be_factorized_is_told_once_a_layer(
    run: Run, folder: Path, options: tuple[str, ...], reason: str
) -> None:
    command = ("compress", "m.onnx", "-o", "out.onnx", "--keep-params", "0.5", *options)
    assert_refused(run, folder, *command, status=3, says=reason)


def test_a_quantized_model_is_told_from_one_without_weights(run: Run, folder: Path) -> None:
    text = "g (float[n,4] x) => (float[n,5] y) { w = DequantizeLinear(q, s) y = MatMul(x, w) }"
    onnx.save(build(text, {"q": np.ones((4, 5), np.int8), "s": np.array(0.1, np.float32)}), folder / "m.onnx")
    assert_refused(run, folder, "compress", "m.onnx", "-o", "o.onnx", "--rank", "2", status=3, says="are quantized")


def test_model_without_a_layer_to_factorize(run: Run, folder: Path) -> None:
    onnx.save(build("g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }"), folder / "m.onnx")
    for target in (("--rank", "4"), ("--keep-params", "0.5"), ("--keep-macs", "0.5")):
        command = ("compress", "m.onnx", "-o", "out.onnx", *target)
        assert_refused(run, folder, *command, status=3, says="cannot be met")


WRONG_VALUES = [
    ("--keep-macs", "1.5"), ("--keep-macs", "0"), ("--keep-params", "-1"), ("--keep-size", "nan"),
    ("--speedup", "0.5"), ("--max-drop", "1"), ("--max-drop", "-0.1"), ("--rank", "0"), ("--rank", "1.5"),
    ("--rank", "energy=0"), ("--rank", "energy=2"), ("--rank", "energy="), ("--rank", "4,5"), ("--rank", "nan"),
    ("--rank", "nonsense"),
]  # fmt: skip


@pytest.mark.parametrize("wish", WRONG_VALUES, ids=[" ".join(wish) for wish in WRONG_VALUES])
def test_target_out_of_range(run: Run, folder: Path, wish: tuple[str, str]) -> None:
    assert_refused(run, folder, "compress", "m.onnx", "-o", "out.onnx", *wish, says=wish[0])


@pytest.mark.parametrize(
    ("options", "says"),
    [(("--technique", "nothing"), "nothing"), (("--technique", "svd:no=1"), "'no'"),
     (("--technique", "svd:multiple=x"), "multiple"), (("--technique", "svd:multiple"), "option=value"),
     (("--technique", "svd:ridge=-1"), "ridge"), (("--technique", "svd:ridge=nan"), "got nan"),
     (("--include", "nope*"), "nope*"), (("--exclude", "nope*"), "nope*"),
     (("--mask", "nope", "--calibrate", "c.npz"), "--mask"), (("--mask", "nope"), "--mask"),
     (("--shape", "x=2"), "--shape"), (("--shape", "z=2,3"), "'z'"), (("--shape", "x"), "--shape"),
     (("--shape", "x=2,33"), "--shape"), (("--shape", "x=0,32"), "--shape")],
)  # fmt: skip
def test_options_that_do_not_fit(run: Run, folder: Path, options: tuple[str, ...], says: str) -> None:
    assert_refused(run, folder, *COMPRESS, *options, says=says)


def test_provider_that_is_not_there(run: Run, folder: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA is there")
    for command in (COMPRESS, ("benchmark", "m.onnx"), ("validate", "m.onnx", "m.onnx"), ("inspect", "m.onnx")):
        assert_refused(run, folder, *command, "--provider", "cuda", says="lowrank-onnx[gpu]")


def test_validate_of_models_that_differ(run: Run, folder: Path) -> None:
    onnx.save(
        build("g (float[n,32] x) => (float[n,48] z) { z = MatMul(x, w) }", {"w": falling(32, 48)}), folder / "o.onnx"
    )
    assert_refused(run, folder, "validate", "m.onnx", "o.onnx", "--evaluate", "e.npz", says="differ")
    onnx.save(
        build("g (float[n,64] a) => (float[n,48] y) { y = MatMul(a, w) }", {"w": falling(64, 48)}), folder / "o.onnx"
    )
    assert_refused(run, folder, "validate", "m.onnx", "o.onnx", says="differ in their inputs: x and a")


def test_a_sweep_that_reaches_nothing_leaves_no_folder(run: Run, folder: Path) -> None:
    assert_refused(run, folder, "sweep", "m.onnx", "-o", "d", "--budgets", "0.0001", status=3, says="cannot be met")
    assert not (folder / "d").exists()
    (folder / "d").mkdir()
    assert_refused(run, folder, "sweep", "m.onnx", "-o", "d", "--budgets", "0.0001", status=3)
    assert (folder / "d").is_dir()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("benchmark", "m.onnx", "--seconds", value), "--seconds") for value in ("nan", "inf", "-1", "0", "1e9")]
    + [(("sweep", "m.onnx", "-o", "d", "--budgets", value), "--budgets") for value in ("nan", "2", "0.5,-1", "", "x")],
)
def test_numbers_out_of_range(run: Run, folder: Path, arguments: tuple[str, ...], says: str) -> None:
    assert_refused(run, folder, *arguments, says=says)
    assert not (folder / "d").exists()


@pytest.mark.parametrize(
    ("call", "says"),
    [(lambda path: lowrank_onnx.compress(path.read_bytes(), rank=4), "got bytes"),
     (lambda path: lowrank_onnx.compress(path, rank=4, jobs=0), "--jobs"),
     (lambda path: lowrank_onnx.compress(path, rank=4, seed=-1), "--seed"),
     (lambda path: lowrank_onnx.compress(path, rank=4, metric=len), "got builtin_function"),  # type: ignore[arg-type]
     (lambda path: lowrank_onnx.sweep(path, path.parent / "d", budgets=()), "--budgets"),
     (lambda path: lowrank_onnx.benchmark([]), "no model")],
)  # fmt: skip
def test_arguments_from_python_that_do_not_fit(folder: Path, call: Callable[[Path], object], says: str) -> None:
    with pytest.raises(lowrank_onnx.LowRankError, match=says):
        call(folder / "m.onnx")


WRONG_USAGE = [
    (), ("nonsense",), ("compress",), ("compress", "m.onnx"), (*COMPRESS, "--nope"), ("benchmark",),
    (*COMPRESS, "--threads", "many"), (*COMPRESS, "--jobs", "0"), (*COMPRESS, "--provider", "tpu"),
    ("compress", "m.onnx", "-o", "out.onnx", "--keep-macs", "half"),
    ("compress", "m.onnx", "-o", "out.onnx", "--keep-macs", "0.5", "--rank", "4"), (*PLAN, "--max-drop", "0.1"),
]  # fmt: skip


@pytest.mark.parametrize("arguments", WRONG_USAGE, ids=[" ".join(entry[-2:]) for entry in WRONG_USAGE])
def test_wrong_usage(run: Run, folder: Path, arguments: tuple[str, ...]) -> None:
    before = files(folder)
    status, _, err = run(*arguments)
    assert status == 2 and "Traceback" not in err and ("Error: " in err or "Usage: " in err)
    assert files(folder) == before


def test_help_and_version(run: Run) -> None:
    for arguments in (("--help",), ("compress", "-h"), ("--version",)):
        status, out, err = run(*arguments)
        assert (status, err) == (0, "") and out


# --- accidents ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide() -> bytes:
    """A model of 2 MB whose compressed form still takes 0.5 MB."""
    proto = build("g (float[n,512] x) => (float[n,1024] y) { y = MatMul(x, w) }", {"w": falling(512, 1024)})
    return bytes(proto.SerializeToString())


@pytest.mark.parametrize("external", [False, True], ids=["one file", "external data"])
def test_disk_full(tmp_path: Path, wide: bytes, external: bool) -> None:
    resource = pytest.importorskip("resource")
    proto = ModelProto()
    proto.ParseFromString(wide)
    if external:
        again = build("g (float[n,512] x) => (float[n,1024] y) { y = MatMul(x, w) z = MatMul(x, v) }",
                      {"w": falling(512, 1024), "v": falling(512, 1024, seed=1)})  # fmt: skip
        again.graph.output.append(onnx.helper.make_empty_tensor_value_info("z"))
        onnx.save(again, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    else:
        onnx.save(proto, tmp_path / "m.onnx")
    before = files(tmp_path)
    include = ["--include", "MatMul_0"] if external else []

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [*CLI, "compress", "m.onnx", "-o", "out.onnx", "--rank", "100", "--technique", "svd", *include],
        cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "nothing was left behind" in done.stderr
    assert files(tmp_path) == before


def _heeding_signals() -> None:
    """In the child: where the tests run in the background or under nohup, it would inherit that they are ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("moment", [0.0, 0.15, 0.5])
def test_stopped_at_any_time(tmp_path: Path, wide: bytes, number: signal.Signals, moment: float) -> None:
    (tmp_path / "m.onnx").write_bytes(wide)
    np.savez(tmp_path / "c.npz", x=correlated((256, 512)))
    before = files(tmp_path)
    wrapper = (
        "import sys, lowrank_onnx.cli as cli\n"
        "print('ready', flush=True)\n"
        "sys.argv = ['lowrank-onnx', *sys.argv[1:]]\n"
        "cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", wrapper, "compress", "m.onnx", "-o", "out.onnx", "--keep-macs", "0.5",
         "--calibrate", "c.npz", "--report", "r.html", "--json", "r.json"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_heeding_signals,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1 + moment)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert err == "Error: interrupted; nothing unfinished was left behind\n"
    assert files(tmp_path) == before


def test_stopped_while_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "lowrank_onnx").mkdir()
    (tmp_path / "lowrank_onnx" / "__init__.py").touch()
    stopping = (
        "try:\n import os, signal\n os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt: pass\nmain = 1"
    )
    (tmp_path / "lowrank_onnx" / "cli.py").write_text(stopping)
    shutil.copy(REPOSITORY / "lowrank_onnx_command.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "lowrank_onnx_command.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        preexec_fn=_heeding_signals,
    )  # fmt: skip
    assert done.returncode == 130
    assert done.stderr == "Error: interrupted; nothing was begun\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_streams_that_are_closed(folder: Path, closed: str) -> None:
    command = f"{shlex.join(CLI)} compress m.onnx -o out.onnx --rank 4 --technique svd {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "out.onnx" in files(folder)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_letters_that_the_terminal_lacks(folder: Path, encoding: str) -> None:
    for arguments in (["passes"], ["inspect", "m.onnx"]):
        done = subprocess.run(
            [*CLI, *arguments], cwd=folder, capture_output=True, timeout=120,
            env={**os.environ, "PYTHONIOENCODING": encoding},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"?" not in done.stdout.splitlines()[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_standard_output_that_is_full() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*CLI, "passes"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: a file, or standard output") and done.stderr.count("\n") == 1, done.stderr


def test_reader_that_goes_away(folder: Path) -> None:
    command = f"{' '.join(CLI)} passes | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr


def test_table_goes_to_standard_output_and_no_bar_to_a_file(folder: Path) -> None:
    done = subprocess.run([*CLI, *COMPRESS], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "" and "MatMul_0" in done.stdout
    assert "\x1b" not in done.stdout


def test_no_file_that_is_read_is_ever_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = Path(__file__).parents[1] / "models" / "digits_mlp"
    for name in ("model.onnx", "calibrate.npz"):
        shutil.copy(source / name, name)
    shutil.copy("model.onnx", "other.onnx")
    before = Path("calibrate.npz").read_bytes()
    commands = [
        [
            "compress",
            "model.onnx",
            "-o",
            "o.onnx",
            "--rank",
            "4",
            "--calibrate",
            "calibrate.npz",
            "--json",
            "calibrate.npz",
        ],
        ["benchmark", "model.onnx", "other.onnx", "--json", "other.onnx"],
    ]
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["lowrank-onnx", *command, "--overwrite"])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 1
        assert "is read by this command and would be overwritten" in capsys.readouterr().err
    assert Path("calibrate.npz").read_bytes() == before
    assert Path("other.onnx").read_bytes() == Path("model.onnx").read_bytes()
