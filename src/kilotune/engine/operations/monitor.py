"""Monitor: the site of a running server, in a thread of the server's process.

On loopback it speaks plain HTTP; anywhere else TLS 1.3 with the federation's own certificate, and only to those who
have the token in `dashboard.token` beside the keys.
"""

import asyncio
import logging
import os
import queue
import secrets
import shutil
import signal
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from kilotune.core.errors import FederationError, KilotuneError, RecipeError
from kilotune.engine.composing.plan import Plan
from kilotune.engine.flower.keys import ServerKeys, address, is_loopback, load_server_keys
from kilotune.engine.flower.traffic import listen
from kilotune.engine.operations.runview import RunView
from kilotune.engine.operations.site import Site
from kilotune.engine.runfolder import RunFolder

START_S = 30.0
TOKEN_FILE = "dashboard.token"
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

Emit = Callable[[dict[str, Any]], None]


def parse_address(text: str) -> tuple[str, int]:
    """[HOST:]PORT; without HOST nobody but this machine can ask."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if colon else "127.0.0.1"
    if not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise RecipeError(f"--dashboard: got {text!r}, expected PORT or HOST:PORT. For example --dashboard 9464.")
    return host, int(port)


def read_token(folder: Path) -> str:
    """The token of this federation's page; made at the first call, readable by its owner alone."""
    path = folder / TOKEN_FILE
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        token = path.read_text(encoding="ascii").strip()
        if len(token) < 32:
            raise FederationError(f"{path}: no token of at least 32 characters. Delete it to get a new one.") from None
        return token
    with os.fdopen(descriptor, "w") as file:
        file.write(token := secrets.token_urlsafe(32))
    return token


@contextmanager
def monitored(where: str | None, plan: Plan, keys_folder: Path, output: Path, emit: Emit) -> Iterator[Emit]:
    """While it lasts the site of a server's run is at `where`, fed by the emit that this yields; None: no site."""
    if where is None:
        yield emit
        return
    keys = load_server_keys(keys_folder)
    about = {"title": plan.recipe.title or "federation", "recipe": plan.id, "base": plan.recipe.base}
    promised = {"delta": plan.privacy.delta, "budget": plan.privacy.epsilon} if plan.privacy is not None else {}
    privacy = {key: value for key, value in promised.items() if value is not None}
    view = RunView(about | {"federation": keys.federation}, plan.recipe.rounds, keys.clients, privacy)
    view.resume(RunFolder(output).events())
    site, listener = _site(where, view, keys, output)

    def both(event: dict[str, Any]) -> None:
        emit(event)
        try:
            view.fold(event)
        except (KeyError, TypeError, ValueError) as error:  # a page must not end the run it shows
            emit({"event": "page", "text": f"the live page misses an event {event['event']!r}: {error!r}"})

    with running(site, listener) as url:
        emit({"event": "page", "text": f"live page at {url}, its token is in {keys.folder / TOKEN_FILE}"})
        try:
            yield both
        except KilotuneError as error:
            if error.exit_code in (1, 2):  # the others were asked for
                view.fold({"event": "failed", "why": str(error)})
            raise


def _site(where: str, view: RunView, keys: ServerKeys, output: Path) -> "tuple[Site, Listener]":
    host, port = parse_address(where)
    local = is_loopback(host)
    if not local and keys.insecure:
        raise FederationError(
            f"--dashboard: got {where!r}, but keys made without TLS allow it on this machine only. "
            "Use 127.0.0.1 and a tunnel (ssh -L), or make keys with TLS."
        )
    site = Site(
        view,
        read_token(keys.folder),
        _terminate,
        lambda: measure(output),
        open_reads=local,
        hosts=LOOPBACK_NAMES if local else None,
    )
    return site, Listener(host, port, None if local else keys)


class Listener:
    """Where a site listens; with keys it does so over TLS."""

    def __init__(self, host: str, port: int, keys: ServerKeys | None) -> None:
        self._keys = keys
        try:
            self.socket = listen(host, port)
        except OSError as error:
            reason = error.strerror or error
            raise FederationError(
                f"--dashboard: cannot listen on {address(host, port)}: {reason}. Choose another address."
            ) from None
        scheme = "http" if keys is None else "https"
        self.url = f"{scheme}://{address(host, self.socket.getsockname()[1])}/"

    def config(self, site: Site) -> uvicorn.Config:
        config = uvicorn.Config(
            site,
            log_config=None,
            log_level=logging.CRITICAL,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            lifespan="off",
            ws="none",
            limit_concurrency=64,
            timeout_graceful_shutdown=2,
            ssl_keyfile=None if self._keys is None else self._keys.key,
            ssl_certfile=None if self._keys is None else self._keys.certificate,
        )
        config.load()
        if config.ssl is not None:
            config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
        return config


@contextmanager
def running(site: Site, listener: Listener) -> Iterator[str]:
    """The site's URL while it is served from a thread; on leaving, open pages get the last state first."""
    server = uvicorn.Server(listener.config(site))
    ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    async def serve() -> None:
        serving = asyncio.create_task(server.serve(sockets=[listener.socket]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        ready.put(serving.exception() if serving.done() else None)
        await serving

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="dashboard", daemon=True)
    thread.start()
    if (error := ready.get(timeout=START_S)) is not None:
        raise FederationError(f"--dashboard: the page did not start: {error}")
    try:
        yield listener.url
    finally:
        site.closing = True
        server.should_exit = True
        thread.join()


def measure(folder: Path) -> dict[str, float]:
    """Free bytes where the run folder is or will be, and this process's peak memory."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    peak: dict[str, float] = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    return {"disk_free_bytes": shutil.disk_usage(there).free, **peak}


def _terminate() -> None:
    """What a service manager would send, so that the page's stop and its stop are one."""
    identity = threading.main_thread().ident
    assert identity is not None, "the main thread has started"
    signal.pthread_kill(identity, signal.SIGTERM)
