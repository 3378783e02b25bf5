"""`clipadapt serve`: adapted models behind HTTP, with a page to try them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from clipadapt.cli.console import count_of, err, out
from clipadapt.errors import ClipadaptError


def serve(
    models: Annotated[
        list[Path] | None, typer.Argument(metavar="[MODELS]...", help="Folders that `clipadapt adapt` wrote.")
    ] = None,
    index: Annotated[
        list[Path] | None, typer.Option(metavar="EMB", help="A folder that `clipadapt embed` wrote; may be repeated.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Serve a backbone as it is, too. Without MODELS: the embedded one.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is all addresses.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that go through a model at once.")] = 32,
    wait_ms: Annotated[
        float, typer.Option(min=0, help="Milliseconds that an item waits for others to fill a batch.")
    ] = 5.0,
    queue: Annotated[
        int, typer.Option(min=1, help="Most images, texts and requests in progress; more get a 503.")
    ] = 256,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds until the answer; after that a 504.")] = 30.0,
    max_body_mb: Annotated[float, typer.Option(min=0.01, help="Largest size of a request.")] = 20.0,
    max_images: Annotated[int, typer.Option(min=1, help="Most images in a request.")] = 32,
    max_pictures: Annotated[int | None, typer.Option(min=1, hidden=True)] = None,  # its old name
    max_pixels: Annotated[int, typer.Option(min=1, help="Most pixels in an image.")] = 50_000_000,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="API keys, one per line; also $CLIPADAPT_API_KEYS.")
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Pages of this origin may send requests; may be repeated."),
    ] = None,
) -> None:
    """Serve MODELS over HTTP: classify, embed, search, explain; a page for people, an API for programs.

    A model whose folder changes is reloaded. The log is JSON lines on stderr.
    """
    with err.status("Loading the models"):
        if not all(map(find_spec, ("fastapi", "uvicorn", "python_multipart", "pyarrow"))):
            raise ClipadaptError('Serving needs an extra: pip install "clipadapt[serve]".')
        from clipadapt.serve.app import create_app
        from clipadapt.serve.indexes import Indexes
        from clipadapt.serve.limits import Settings, read_keys
        from clipadapt.serve.log import log_to_stderr
        from clipadapt.serve.models import Models
        from clipadapt.serve.run import run

        settings = Settings(
            batch_size=batch_size,
            wait=wait_ms / 1000,
            queue=queue,
            deadline=deadline,
            max_body=round(max_body_mb * 1e6),
            max_images=min(max_pictures or max_images, queue),
            max_pixels=max_pixels,
            max_texts=min(Settings.max_texts, queue),
            keys=read_keys(api_key_file),
            cors=tuple(cors or ()),
        )
        served = Models(models or (), backbone)
        indexes = Indexes(index or (), served)
        app = create_app(served, indexes, settings)
    log_to_stderr()

    def ready(address: str) -> None:
        names = [f"{name} ({count_of(len(one.class_names), 'class')})" for name, one in served.served.items()]
        names += [f"{name} ({count_of(len(one.index), 'image')})" for name, one in indexes.searched.items()]
        out.print(f"Serving {', '.join(names)} at {address}", markup=False, soft_wrap=True)

    try:
        run(app, host, port, ready)
    except KeyboardInterrupt:  # which is how a server is stopped; everything accepted has been answered
        raise typer.Exit(130) from None
