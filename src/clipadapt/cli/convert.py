"""`clipadapt convert`: a checkpoint in OpenAI's or OpenCLIP's naming becomes a folder that transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[Path, typer.Argument(help="Weights: .safetensors, .pt (state dict or TorchScript), .pth, .bin")],
    out: Annotated[Path, typer.Argument(help="Folder to write; an older one there is replaced")],
    activation: Annotated[
        str | None,
        typer.Option(help="quick_gelu (OpenAI) or gelu (most of OpenCLIP); needed where the file does not tell"),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer folder, hub id, or CLIP's merges file; without one only token ids are encoded"),
    ] = None,
) -> None:
    """Convert an OpenAI or OpenCLIP ViT checkpoint to a plain transformers folder."""
    from clipadapt.backbones import convert_checkpoint

    backbone = convert_checkpoint(source, out, activation=activation, tokenizer=tokenizer)
    text = backbone.model.config.text_config
    typer.echo(
        f"{out}: CLIP with images of {backbone.image_size[0]} px in patches of {backbone.patch_size}, features of "
        f"{backbone.dim}, activation {text.hidden_act}, "
        + ("with its tokenizer" if backbone.tokenizer else "without a tokenizer (token ids only)")
    )
