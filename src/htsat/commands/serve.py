"""``htsat serve``: an HTTP and WebSocket API, and a page, on models of ours."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from htsat.commands.console import tell
from htsat.errors import UsageError

if TYPE_CHECKING:
    from htsat.apps.serve.settings import ServeSettings

#: what the extra ``serve`` brings
_PACKAGES = (
    "fastapi", "h11", "prometheus_client", "pydantic", "python_multipart", "starlette", "uvicorn", "websockets",
)  # fmt: skip


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL...]",
            help="Names (see htsat models), checkpoints or exported models; NAME=PATH gives a name. "
            "The first one answers where none is asked for.",
            show_default="default",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="To listen at; 0: any that is free.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="Processes that answer; they share the threads.")] = 1,
    token: Annotated[
        str | None, typer.Option(help="Let in only who shows this; also HTSAT_TOKEN.", show_default="let all in")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Tokens, one a line, each of them for one client.")
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="Let pages of this origin use the API; may be repeated.", show_default="none"
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name by which a balancer in front asks for this server.",
            show_default="this machine",
        ),
    ] = None,
    proxy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS", help="Balancer whose X-Forwarded-For is believed; may be repeated.", show_default="none"
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(metavar="NAME", help="What runs the networks: torch, compiled, onnxruntime, openvino."),
    ] = "auto",
    precision: Annotated[str, typer.Option(metavar="NAME", help="Of the networks: float32 or bfloat16.")] = "float32",
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="CPU threads of the networks, of all workers together.", show_default="one for each core"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Chunks in a call, where a network gains by it.")] = 4,
    max_bytes: Annotated[int, typer.Option(min=1, metavar="BYTES", help="Of a body.")] = 100_000_000,
    max_seconds: Annotated[float, typer.Option(metavar="SECONDS", help="Of a recording.")] = 3600.0,
    max_files: Annotated[int, typer.Option(min=1, help="Recordings in a body.")] = 16,
    max_requests: Annotated[
        int | None,
        typer.Option(min=1, help="Of a worker at once; beyond, 503.", show_default="8 for each thread, at least 16"),
    ] = None,
    max_client_requests: Annotated[
        int | None, typer.Option(min=1, help="Of one client at once; beyond, 429.", show_default="half of them")
    ] = None,
    max_streams: Annotated[int, typer.Option(min=0, help="Live streams of a worker at once.")] = 16,
    max_wait: Annotated[float, typer.Option(metavar="SECONDS", help="That sound may wait until it is heard.")] = 10.0,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="That a request may take.")] = 300.0,
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", help="For accepted requests when the server is told to stop.")
    ] = 30.0,
    decoders: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes of a worker that decode recordings.", show_default="4 for each thread and 8"
        ),
    ] = None,
    hop: Annotated[float, typer.Option(min=0.1, max=60, metavar="SECONDS", help="Between results of a stream.")] = 1.0,
) -> None:
    """Answer over HTTP and WebSockets: tags and events of recordings, live streams, and a page to use them by."""
    try:
        from htsat.apps.serve.run import serve as serve_until_stopped
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        raise UsageError(
            f"htsat serve needs {error.name}, which is not installed: pip install 'htsat[serve]'"
        ) from None
    from htsat.apps.serve.settings import ServeSettings, named_models, read_tokens

    choices: dict[str, Any] = {"backend": backend, "precision": precision}
    settings = ServeSettings(
        models=named_models(models or []),
        host=host,
        port=port,
        workers=workers,
        tokens=read_tokens(token, token_file),
        cors=tuple(cors or ()),
        allowed_hosts=tuple(allow_host or ()),
        proxies=tuple(proxy or ()),
        threads=threads,
        batch_size=batch_size,
        max_bytes=max_bytes,
        max_seconds=max_seconds,
        max_files=max_files,
        max_requests=max_requests,
        max_client_requests=max_client_requests,
        max_streams=max_streams,
        max_wait=max_wait,
        timeout=timeout,
        grace=grace,
        decoders=decoders,
        hop_seconds=hop,
        **choices,
    )

    def ready(address: str, serving: Any) -> None:
        _say_ready(settings, address, serving)

    sys.exit(serve_until_stopped(settings, ready))


def _say_ready(settings: "ServeSettings", address: str, serving: Any) -> None:
    from htsat.apps.serve.guard import is_exposed

    names = ", ".join(name for name, _ in settings.models)
    where = f" ({settings.workers} workers)" if settings.workers > 1 else ""
    tell(f"listening at {address}{where}, models: {names}; stop with Ctrl+C")
    if is_exposed(settings.host) and not settings.tokens:
        tell(f"warning: everybody who reaches {settings.host} may use this server; give --token or --token-file")
    if serving is not None:
        tell(f"decoders: {serving.sandbox}")
