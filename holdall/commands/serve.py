"""The command `holdall serve`."""

from __future__ import annotations

import importlib.util
import os
import socket
from pathlib import Path

from holdall import language_model
from holdall.commands import console
from holdall.commands.loading import Loading
from holdall.engine import Engine, EngineConfig, StateStore, StoreConfig

KEY = "HOLDALL_API_KEY"
"""Environment variable with the API key."""
GRACE_S = 10
"""How long requests may go on after the signal to stop."""
NEEDS = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    run: str,
    host: str,
    port: int,
    name: str | None,
    rows: int,
    queue: int,
    max_context: int | None,
    sessions: Path | None,
    store_memory: int,
    store: Path | None,
    replay: int,
    state_dtype: str,
    drafts: int,
    api_key_file: Path | None,
    loading: Loading,
) -> int:
    """Serve a model until a signal; returns the exit status."""
    if missing := [package for package in NEEDS if importlib.util.find_spec(package) is None]:
        raise ValueError(f"holdall serve needs packages: pip install {' '.join(missing)}")
    from holdall.serve.app import HttpServer, create_app
    from holdall.serve.server import ServerConfig

    key = api_key(api_key_file)
    loading.load_mixers()
    listener = _listener(host, port)  # before the model is loaded, which may take minutes
    with listener:
        model = loading.model(run)
        if replay:
            model = model.with_replay(replay, state_dtype=state_dtype)
        settings = EngineConfig(rows=rows, queue=queue, max_context=max_context, drafts=drafts)
        kept = None
        if store_memory:
            folder = None if store is None else str(store)
            kept = StateStore(
                StoreConfig(memory=store_memory, folder=folder),
                fingerprint=model.fingerprint,
                model=model.model,
            )
        engine = Engine(model.model, model.tokenizer, settings, store=kept)
        with console.status("recording steps of all sizes on the GPU, so that no request waits for them"):
            engine.warm_up()  # on a CPU nothing
        config = ServerConfig(
            name=name or Path(run).absolute().name,
            api_key=key,
            sessions=None if sessions is None else str(sessions),
        )
        model_folder = None if Path(run).is_file() else language_model.find_folder(run)
        app = create_app(engine, model, config, folder=model_folder)
        stats = engine.stats()
        console.print(f"{config.name} at {url(listener)} (OpenAI's API: {url(listener)}/v1)")
        console.print(
            f"{stats.rows} rows of {stats.row_bytes:,} bytes of state, {stats.state_bytes:,} bytes in all"
        )
        HttpServer(app, grace_s=GRACE_S).run(sockets=[listener])
        if kept is not None:
            kept.flush()
    return 0


def api_key(file: Path | None) -> str:
    """The key in a file, or the environment's; "" for none. Raises ValueError for an empty file."""
    if file is None:
        return os.environ.get(KEY, "")
    key = file.read_text("utf-8").strip()
    if not key:
        raise ValueError(f"{file} is empty: write the API key into it")
    return key


def url(listener: socket.socket) -> str:
    """Where a browser finds what listens there."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        # the address stands where a file's name would
        says = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise OSError(error.errno, says, f"{host}:{port}") from error
