"""The commands put together; how errors, Ctrl-C and the noise of other libraries reach the terminal."""

from __future__ import annotations

import os
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from clipadapt import __version__
from clipadapt.cli import (
    adapt,
    bench,
    clusters,
    convert,
    data,
    dedup,
    demo,
    embed,
    evaluate,
    export,
    index,
    methods,
    predict,
    pretrain,
    search,
    serve,
)
from clipadapt.cli.console import err, out
from clipadapt.errors import ClipadaptError

EPILOG = """
Exit codes: **0** all is well; **1** something failed, and one line on stderr says what (for `predict`
also when some of the images could not be read); **2** the command line itself is wrong; **130** stopped by Ctrl-C.
"""

# What a user can cause and fix: bad input, a full or write-protected disk, a learning rate that is too high.
_ANSWERABLE = (ClipadaptError, OSError, FloatingPointError)


class Commands(TyperGroup):
    """The commands, whose errors become one line and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--debug" in args:  # it may also come after the command's name
            args = ["--debug", *(arg for arg in args if arg != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _ANSWERABLE as error:
            if ctx.params["debug"] or isinstance(error, BrokenPipeError):
                raise
            err.print("[bold red]error:[/]", end=" ")
            err.print(str(error), style="red", markup=False, soft_wrap=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            if ctx.params["debug"]:
                raise
            err.print("interrupted; features and training so far are kept, and the same command resumes from there")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="clipadapt",
    cls=Commands,
    help="Make a pretrained CLIP-like model good at your images.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"clipadapt {__version__}")
        raise typer.Exit


@app.callback()
def prepare(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback; may be given anywhere.")] = False,
) -> None:
    """What every command does first: print the version if asked, and silence other libraries' noise."""
    if debug:
        return
    for library in ("TRANSFORMERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module=r"(torch|transformers|huggingface_hub|sklearn|peft|accelerate)\b")
    warnings.showwarning = lambda message, *_: err.print(f"warning: {message}", style="yellow", markup=False)


app.command()(adapt.adapt)
app.command()(predict.predict)
app.command()(evaluate.evaluate)
app.command()(embed.embed)
app.command()(index.index)
app.command()(search.search)
app.command()(dedup.dedup)
app.command()(clusters.clusters)
app.command()(serve.serve)
app.command()(methods.methods)
app.command()(demo.demo)
app.command()(convert.convert)
app.command()(export.export)
app.command()(bench.bench)
app.add_typer(data.app, name="data")
app.add_typer(pretrain.app, name="pretrain")
