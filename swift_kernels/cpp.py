"""Builds (on first use) and loads the C++ kernels of `csrc/`."""


class BuildError(RuntimeError):
    """The C++ kernels cannot be built or loaded here; the message says why."""


def load() -> None:
    raise BuildError("not written yet")
