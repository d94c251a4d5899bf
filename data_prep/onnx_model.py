"""Open ONNX files for inference that gives the same numbers each time."""

from pathlib import Path
from typing import Any

import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, InvalidProtobuf

from trainer.errors import BadInput


def open_onnx(path: Path, *, key: str, input_shape: tuple[int | None, ...]) -> Any:  # noqa: ANN401
    """Open a network of one input for one thread of the CPU.

    One thread: sums in a fixed order, and processes are what runs side by side here.

    Args:
        path: The file.
        key: The config key that names it, for errors.
        input_shape: Sizes that its input must have; None is any size.

    Returns:
        An onnxruntime.InferenceSession.

    Raises:
        BadInput: The file is no ONNX network, or one with another input.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except (Fail, InvalidGraph, InvalidProtobuf) as error:
        reason = str(error).strip().split("\n")[0]
        raise BadInput(f"{key}={path} is no ONNX network ({reason}).") from error
    first, *others = session.get_inputs()
    fits = len(first.shape) == len(input_shape) and all(
        want is None or got == want or isinstance(got, str)
        for got, want in zip(first.shape, input_shape, strict=True)
    )
    if others or not fits:
        raise BadInput(
            f"{key}={path} has the input {first.shape}, need {list(input_shape)} (null is any). "
            "Give the weights of the network that the key names."
        )
    return session
