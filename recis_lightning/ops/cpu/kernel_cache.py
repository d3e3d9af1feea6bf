"""Machine code of CPU kernels on disk.

It lies in the first of these folders that is private (``ops.private_folder``):
``$NUMBA_CACHE_DIR/recis_lightning`` if that variable is set, ``__pycache__/kernels`` beside the
kernels, ``$XDG_CACHE_HOME/recis_lightning`` (by default in ``~/.cache``). If there is none,
processes compile for themselves, and a warning says so.

Each kernel, with its constants and for one kind of processor, has files of its own: processes that
compile at once write the same, and replace whole files.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from numba.core import compiler
from numba.core.caching import IndexDataCacheFile
from numba.core.registry import cpu_target

from recis_lightning.ops.private_folder import open_private

SILENT_SECONDS = 1.0  # of compiling, before a line says so

_log = logging.getLogger(__name__)


@functools.cache
def cache_folder() -> Path | None:
    """Return the folder where kernels are kept, None if there is none; found once a process."""
    refused = []
    for folder in _candidates():
        reason = open_private(folder)
        if reason is None:
            if refused and "NUMBA_CACHE_DIR" in os.environ:
                _log.warning("Kernels are kept in %s: %s", folder, "; ".join(refused))
            _log.debug("Kernels are kept in %s", folder)
            return folder
        refused.append(reason)
    _log.warning(
        "No folder to keep compiled kernels in, so each process compiles them anew, which takes "
        "seconds; set NUMBA_CACHE_DIR to a folder of your own (%s)",
        "; ".join(refused),
    )
    return None


class CompilingNotice:
    """Says, once a process, that kernels are compiled, when that has taken a second in all.

    So a new installation says it, and a process that needs a kernel or two more does not.
    """

    def __init__(self) -> None:
        self._seconds = 0.0  # of compiling so far
        self._is_given = False

    def silence(self) -> None:
        """Say nothing in this process."""
        self._is_given = True

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Return a context in which a kernel is compiled; there is one at a time."""
        timer = threading.Timer(max(SILENT_SECONDS - self._seconds, 0.0), self._give)
        timer.daemon = True
        start = time.monotonic()
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self._seconds += time.monotonic() - start

    def _give(self) -> None:
        folder = cache_folder()
        if not self._is_given and folder is not None:  # else a warning was logged
            self._is_given = True
            _log.warning(
                "Compiling kernels, each once per installation; they are kept in %s", folder
            )


notice = CompilingNotice()


def _candidates() -> list[Path]:
    folders = []
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        folders.append(Path(chosen) / "recis_lightning")
    folders.append(Path(__file__).parent / "__pycache__" / "kernels")
    if root := os.environ.get("XDG_CACHE_HOME"):
        folders.append(Path(root) / "recis_lightning")
    elif (home := Path("~").expanduser()).is_absolute():
        folders.append(home / ".cache" / "recis_lightning")
    return folders


class KernelCache:
    """Files of one kernel.

    Args:
        function: The kernel.
        constants: What it is compiled with; tells it from others of the same function.
        signature: Its types.
    """

    def __init__(
        self, function: Callable[..., None], constants: tuple[int, ...], signature: Any
    ) -> None:
        target = cpu_target.target_context.codegen().magic_tuple()
        source, line = inspect.getfile(function), function.__code__.co_firstlineno
        identity = (os.path.realpath(source), line, function.__qualname__, constants, target)
        digest = hashlib.blake2b(repr((identity, signature)).encode(), digest_size=12).hexdigest()
        self._key = digest
        folder, self._file = cache_folder(), None
        if folder is not None and os.path.exists(source):
            # Numba would see a change of the function's own file only, not of an intrinsic or of
            # a field of the header.
            stamp = (_digest_of(source), _sources_digest())
            self._file = IndexDataCacheFile(str(folder), f"{function.__name__}-{digest}", stamp)

    def load(self) -> Any:
        """Return the compiled kernel, or None."""
        if self._file is None:
            return None
        try:
            data = self._file.load(self._key)
        except Exception as error:  # a damaged file is as good as none
            _log.warning("A kept kernel cannot be read and is compiled anew: %s", error)
            with contextlib.suppress(OSError):
                self._file.flush()
            return None
        if data is None:
            return None
        return compiler.CompileResult._rebuild(cpu_target.target_context, *data)

    def save(self, result: Any) -> None:
        """Keep a compiled kernel, if there is room for it."""
        if self._file is None or result.library.has_dynamic_globals:
            return
        try:
            self._file.save(self._key, result._reduce())
        except OSError as error:
            _log.warning("A compiled kernel cannot be kept: %s", error)


def _digest_of(path: str) -> str:
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()


@functools.cache
def _sources_digest() -> str:
    digest = hashlib.blake2b(digest_size=16)
    # The fields that kernels read are those of the contracts in the folder above.
    folder = Path(__file__).parent
    for path in sorted([*folder.glob("*.py"), *folder.parent.glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


__all__ = ["CompilingNotice", "KernelCache", "cache_folder", "notice"]
