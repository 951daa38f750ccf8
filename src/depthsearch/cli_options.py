"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Argument(help="Run configuration, a YAML file.")]
Model = Annotated[str, typer.Argument(help="Hub id, directory or GGUF file.")]
Out = Annotated[Path, typer.Option("--out", help="New directory; never an existing one.")]
Unfinished = Annotated[
    Path, typer.Option("--out", help="New directory, or that of the same command, interrupted.")
]
Run = Annotated[Path, typer.Argument(help="Run directory of `depthsearch search`.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a setting, such as search.seed=3. May be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
ContextTokens = Annotated[
    int, typer.Option(help="Tokens of context for FLOPs, KV bytes and decoding steps.")
]
Repeats = Annotated[int, typer.Option(min=1, help="Turns of the speed measurement.")]
