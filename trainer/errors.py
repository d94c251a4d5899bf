"""The two kinds of error a user can meet; the command line prints them without a traceback."""


class BadInput(ValueError):
    """A configuration, a file or a row is wrong; the message says what would be right."""


class BadWorld(RuntimeError):
    """The machine failed us (disk, network, process); the message says what still stands."""


class BadData(BadInput):
    """Content of a dataset that is not what its manifest says; a stream replaces and counts it."""


def disk_full(error: OSError) -> str:
    """Say where the disk is full and what still stands."""
    place = error.filename or "the output folder"
    return (
        f"the disk is full at {place}. Everything published before is valid: "
        "free some space, or choose another folder, and give the same command again."
    )
