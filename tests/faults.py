"""Real processes that are killed, or whose disk fails, at a chosen file or step; nothing of the library is replaced."""

import contextlib
import errno
import fnmatch
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

WRITING = ("w", "a", "x", "+")


def _writes(path: Any, mode: Any, flags: Any) -> bool:
    """Does an `open` event write?"""
    if isinstance(mode, str):
        return any(letter in mode for letter in WRITING)
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def at_file(pattern: str, number: int, act: Callable[[], Any], event: str = "open", every: bool = False) -> None:
    """From now on, act when the `number`-th file like `pattern` is opened for writing, renamed to or removed."""
    seen = 0

    def hook(name: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if name != event or not args:
            return
        path = args[1] if event == "os.rename" else args[0]
        if not isinstance(path, (str, os.PathLike)) or (event == "open" and not _writes(*args[:3])):
            return
        if fnmatch.fnmatch(os.fspath(path), pattern):
            seen += 1
            if every or seen == number:
                act()

    sys.addaudithook(hook)


def at_step(number: int, act: Callable[[], Any]) -> None:
    """Act after the `number`-th optimizer step of this process."""
    seen = 0

    def hook(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            act()

    register_optimizer_step_post_hook(hook)


def at_forward(kind: type, number: int, act: Callable[[], Any]) -> None:
    """Act in the `number`-th pass without gradients through a network of this kind."""
    seen = 0

    def hook(module: torch.nn.Module, *_: Any) -> None:
        nonlocal seen
        if isinstance(module, kind) and not torch.is_grad_enabled():
            seen += 1
            if seen == number:
                act()

    torch.nn.modules.module.register_module_forward_pre_hook(hook)


def kill() -> None:
    """As the kernel does when memory runs out, or an operator in a hurry."""
    os.kill(os.getpid(), signal.SIGKILL)


def no_space() -> None:
    """As a full disk answers."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_child(work: Callable[[], Any], limit_s: float = 120.0, with_helpers: bool = True) -> tuple[int, str]:
    """Run in a forked process: its exit code (-9: killed by SIGKILL; 0: worked; 3: raised), and what it raised.

    The child leads a group of its own. Data workers that outlive it hold its pipe open, so nobody reads to the end of
    that pipe, and they are killed `with_helpers`.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 0
        os.setpgid(0, 0)
        os.close(reader)
        try:
            work()
        except BaseException as error:
            code = 3
            text = f"{type(error).__name__}: {error}"
            os.write(writer, text.encode()[:60_000])  # less than a pipe holds
            if os.environ.get("FAULTS_SHOW"):
                traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    give_up = time.monotonic() + limit_s
    try:
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > give_up:
                os.kill(pid, signal.SIGABRT)  # faulthandler writes where it stands
                os.waitpid(pid, 0)
                raise AssertionError(f"the child did not end within {limit_s} s")
            time.sleep(0.02)
        os.set_blocking(reader, False)
        try:
            said = os.read(reader, 60_000).decode()
        except BlockingIOError:  # it said nothing, and a data worker of it is still alive
            said = ""
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            if with_helpers:
                os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status), said


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
