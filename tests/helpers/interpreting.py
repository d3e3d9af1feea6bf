"""How the processes of the tests interpret kernels."""

import importlib.util


def quicken_interpreter() -> None:
    """Have this process interpret kernels in about half the time, if it interprets them."""
    if importlib.util.find_spec("triton") is not None:
        from recis_lightning.ops.gpu import runtime

        if runtime.INTERPRETED:
            from tests.helpers import quick_interpreter

            quick_interpreter.install()
