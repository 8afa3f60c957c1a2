"""What can go wrong for a person who uses the tool, as exceptions with a one-line message each."""


class LowRankError(Exception):
    """A wrong input: says what was expected, what was found, and what to do next."""


class ModelError(LowRankError):
    """The model file cannot be read, run or written."""


class DataError(LowRankError):
    """Calibration or evaluation data do not fit the model."""


class MetricError(LowRankError):
    """A metric is unknown, fails, or returns no finite number."""


class ProviderError(LowRankError):
    """onnxruntime, or the execution provider that was asked for, is not there."""


class PlanError(LowRankError):
    """A plan does not fit the model it is applied to."""


class TargetError(LowRankError):
    """The target cannot be met; the message tells the best that was reached."""
