"""onnxruntime sessions: how a model is opened, on which provider, with how many threads."""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import onnx

from lowrank_onnx.data import InputSpec
from lowrank_onnx.errors import ModelError, ProviderError

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cuda-graph": "CUDAExecutionProvider",  # timed as one captured graph, without the gaps between kernels
}
TF32 = "allowed in float32 products and convolutions, as onnxruntime does by default; NVIDIA_TF32_OVERRIDE=0 forbids it"

# onnxruntime names element types like this; numpy has no name for the others (bfloat16, float8).
_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint64)": np.uint64,
    "tensor(uint32)": np.uint32,
    "tensor(uint16)": np.uint16,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
    "tensor(string)": np.object_,
}


@dataclass(frozen=True)
class Runtime:
    """Where a model runs.

    Attributes:
        provider: ``cpu``, ``cuda``, or ``cuda-graph`` for CUDA with the timed runs captured as a graph.
        threads: Intra-op threads; 0 leaves the choice to onnxruntime.
    """

    provider: str = "cpu"
    threads: int = 0

    def __post_init__(self) -> None:
        if self.provider not in PROVIDERS:
            raise ProviderError(f"--provider must be one of {', '.join(PROVIDERS)}, got '{self.provider}'")
        most = 4 * joblib.cpu_count()
        if not 0 <= self.threads <= most:
            raise ProviderError(
                f"--threads must be from 0 (onnxruntime decides) to {most}, four for each core; got {self.threads}"
            )

    @property
    def device(self) -> str:
        """The name of the processor, as a person would say it."""
        return _gpu_name() if self.on_gpu else _cpu_name()

    @property
    def on_gpu(self) -> bool:
        """Whether sessions run on a GPU."""
        return self.provider != "cpu"

    @property
    def memory(self) -> str:
        """Where inputs and outputs lie while a session is timed, as onnxruntime names it."""
        return "cuda" if self.on_gpu else "cpu"

    @property
    def used_threads(self) -> int:
        """The number of intra-op threads a session gets."""
        return self.threads or joblib.cpu_count(only_physical_cores=False)


def onnxruntime() -> Any:
    """Return the onnxruntime module.

    Raises:
        ProviderError: It is not installed; the message names both extras.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        cause: BaseException | None = error
        while cause is not None:
            if not isinstance(cause, Exception):  # a signal that came while the library was loading
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise ProviderError(
            "onnxruntime is not installed; run pip install 'lowrank-onnx[cpu]', or "
            f"'lowrank-onnx[gpu]' for CUDA ({error})"
        ) from error
    if not hasattr(ort, "InferenceSession"):
        raise ProviderError(
            "the installed onnxruntime is incomplete (onnxruntime and onnxruntime-gpu overwrite each other); "
            "uninstall both, then pip install 'lowrank-onnx[cpu]' or 'lowrank-onnx[gpu]'"
        )
    return ort


def open_session(
    model: onnx.ModelProto | bytes,
    runtime: Runtime,
    folder: Path | None = None,
    optimize: bool = True,
    what: str = "the model",
    timed: bool = False,
) -> Any:
    """Open a model that is in memory.

    Args:
        model: The model, or its serialized form; external data stay files.
        runtime: Provider and threads.
        folder: Where the external data of the model lie; None if it has none.
        optimize: False keeps every node as it is written.
        what: How an error names the model.
        timed: The session is going to be timed: with provider ``cuda-graph`` it gets a graph.

    Returns:
        An ``onnxruntime.InferenceSession``.

    Raises:
        ModelError: onnxruntime does not accept the model; its own reason is in the message.
        ProviderError: The provider is not there; never a silent fall-back to another.
    """
    ort = onnxruntime()
    provider = PROVIDERS[runtime.provider]
    if provider not in ort.get_available_providers():
        raise ProviderError(
            f"--provider {runtime.provider} needs {provider}, but this onnxruntime {ort.__version__} offers "
            f"{', '.join(ort.get_available_providers())}; pip install 'lowrank-onnx[gpu]' on a machine with CUDA"
        )
    graph = timed and runtime.provider == "cuda-graph"
    settings = {"use_tf32": "1", "enable_cuda_graph": str(int(graph))} if runtime.on_gpu else {}
    if runtime.on_gpu:
        _preload()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = runtime.used_threads
    options.inter_op_num_threads = 1
    # A pool that spins on between runs steals the cores from whatever runs next, as every second session here does.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", str(int(runtime.on_gpu)))
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        content = model if isinstance(model, bytes) else model.SerializeToString()
    except ValueError as error:  # protobuf's limit of 2 GiB for one message
        raise ModelError(f"{what} passes 2 GiB in one file; save it with external data first ({error})") from error
    try:
        session = ort.InferenceSession(content, options, providers=[(provider, settings)])
    except Exception as error:  # onnxruntime raises a class of its own for each status code
        hint = "; --provider cuda runs it without a captured graph" if graph else ""
        raise ModelError(f"onnxruntime does not accept {what}: {one_line(error)}{hint}") from error
    if provider not in session.get_providers():
        raise ProviderError(
            f"onnxruntime could not load {provider} and fell back to {', '.join(session.get_providers())}; "
            "check the CUDA and cuDNN libraries, or use --provider cpu"
        )
    return session


def input_specs(session: Any) -> list[InputSpec]:
    """Return the inputs a caller has to feed, in order.

    Raises:
        ModelError: An input is no tensor of a type numpy knows.
    """
    specs = []
    for value in session.get_inputs():
        if value.type not in _NUMPY_TYPES:
            raise ModelError(f"input '{value.name}' has type {value.type}; only dense tensors can be fed")
        specs.append(InputSpec(value.name, np.dtype(_NUMPY_TYPES[value.type]), tuple(value.shape)))
    return specs


def run(session: Any, feeds: Mapping[str, np.ndarray], names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Run a session once and return the outputs by name.

    Raises:
        ModelError: onnxruntime could not run the model on these inputs.
    """
    feeds = fit_empty(feeds, {value.name: tuple(value.shape) for value in session.get_inputs()})
    wanted = [output.name for output in session.get_outputs()] if names is None else list(names)
    if not wanted:
        return {}  # onnxruntime takes an empty list for all outputs
    try:
        values = session.run(wanted, dict(feeds), _uncaptured(session))
    except Exception as error:  # see open_session
        shapes = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in feeds.items())
        raise ModelError(f"onnxruntime could not run the model on {shapes[:300]}: {one_line(error)}") from error
    return dict(zip(wanted, values, strict=True))


def fit_empty(feeds: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[Any]]) -> dict[str, np.ndarray]:
    """Give arrays without a value, such as an empty cache, the sizes a model asks for: they hold nothing to lose."""
    fitted = dict(feeds)
    for name, value in feeds.items():
        wanted = shapes.get(name, ())
        if value.size == 0 and len(wanted) == value.ndim:
            sizes = [size if isinstance(size, int) else own for size, own in zip(wanted, value.shape, strict=True)]
            fitted[name] = value.reshape(sizes) if 0 in sizes else value
    return fitted


def _uncaptured(session: Any) -> Any:
    """Options of a run that leaves a captured graph alone, which is for one shape and fixed addresses; else None."""
    if session.get_provider_options().get(PROVIDERS["cuda"], {}).get("enable_cuda_graph") != "1":
        return None
    options = onnxruntime().RunOptions()
    options.add_run_config_entry("gpu_graph_id", "-1")
    return options


def left_on_cpu(session: Any) -> tuple[list[str], int] | None:
    """Return the operators of the nodes that run on the CPU, each as often as it occurs, and the number of all nodes.

    None for a session of the CPU, and for an onnxruntime before 1.24, which does not tell.
    """
    if PROVIDERS["cuda"] not in session.get_providers() or not hasattr(session, "get_provider_graph_assignment_info"):
        return None
    parts = session.get_provider_graph_assignment_info()
    nodes = [(part.ep_name, node.op_type) for part in parts for node in part.get_nodes()]
    return [operator for provider, operator in nodes if provider == PROVIDERS["cpu"]], len(nodes)


def one_line(error: BaseException) -> str:
    """The message of an exception on one line, at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _cpu_name() -> str:
    import platform

    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def _preload() -> None:
    """Let onnxruntime find the CUDA libraries that were installed as Python packages; those of the system it finds."""
    preload = getattr(onnxruntime(), "preload_dlls", None)
    if preload is not None:
        with contextlib.redirect_stdout(io.StringIO()):  # what is missing shows when the provider is loaded
            preload()


def gpu_libraries() -> dict[str, str]:
    """Versions of the GPU libraries in this process, by name; empty where none is loaded or nobody can tell."""
    try:
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    except OSError:
        return {}
    asked = {"cublasLt": "cublasLtGetVersion", "cudnn": "cudnnGetVersion"}
    found = {}
    for name, function in asked.items():
        path = next((entry for entry in sorted(mapped) if Path(entry).name.startswith(f"lib{name}.so")), None)
        if path is not None:
            call = getattr(ctypes.CDLL(path), function)
            call.restype = ctypes.c_size_t
            found[name] = str(call())
    return found


@cache
def _gpu_name() -> str:
    import os
    import shutil
    import subprocess

    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "CUDA device 0"
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader", f"--id={device}"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    return answer or "CUDA device 0"
