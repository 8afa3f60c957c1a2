"""Reports: what was done at every layer and why, as JSON, as terminal tables and as one HTML page."""

from lowrank_onnx.report.files import write_arrays
from lowrank_onnx.report.frontier import write_frontier_html
from lowrank_onnx.report.html import write_html
from lowrank_onnx.report.inspection import render_inspection, write_inspection_html
from lowrank_onnx.report.json_report import ReportDict, write_json
from lowrank_onnx.report.terminal import encodable, render_terminal

__all__ = [
    "ReportDict",
    "encodable",
    "render_inspection",
    "render_terminal",
    "write_arrays",
    "write_frontier_html",
    "write_html",
    "write_inspection_html",
    "write_json",
]
