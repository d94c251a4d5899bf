"""Read `.npy` content: arrays of numbers, from any thread."""

import io
import threading
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

HEADER_BYTES = 128
"""What numpy pads the header of a small array to."""
# numpy evaluates a header as a Python literal, and Python 3.11 raises SystemError when two threads
# do that at once (CPython issue 106905).
_parsing = threading.Lock()


def read_npy(content: bytes) -> NDArray[Any]:
    """Read an array; objects are refused.

    Raises:
        ValueError: The content is no array of numbers, or not all of one.
    """
    try:
        with _parsing:
            array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except ValueError:
        raise
    except Exception as error:  # numpy raises more for headers that are broken in odd ways
        raise ValueError(str(error)) from error
    return array


@lru_cache(maxsize=4096)
def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Give the header of an array as numpy writes it."""
    header = io.BytesIO()
    facts = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, facts)
    return header.getvalue()
