"""The command line: arguments in, one call, figures out."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from depthsearch import __version__
from depthsearch.cli_options import (
    Config,
    ContextTokens,
    Device,
    Dtype,
    Json,
    Model,
    Out,
    Repeats,
    Revision,
    Run,
    Set,
    Unfinished,
)
from depthsearch.cli_output import Ended, fail, finished, present, say
from depthsearch.errors import CONTINUED, DepthsearchError, InputError, StorageError
from depthsearch.sources import is_disk_full, quiet

_INTERRUPTED = 130
# The usage error of the click that typer comes with or needs, whichever it is.
_USAGE: Any = typer.BadParameter.__bases__[0]
_OUT_OF_REACH = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)

# Read by OpenMP when torch is first imported. Threads that spin while they wait make a search
# several times slower as soon as anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    name="depthsearch",
    help="Find the sublayers a pretrained transformer can do without at a budget you fix, and "
    "export the smaller model.\n\nStart with `depthsearch inspect MODEL`, write a configuration "
    "(examples in the README), then `depthsearch search CONFIG --out RUN` and `depthsearch export "
    "RUN OUT`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.command()
def inspect(
    model: Model,
    context_tokens: ContextTokens = 2048,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    latency: Annotated[
        Path | None, typer.Option(help="Table of `depthsearch latency` to show too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a model's sites, what each one costs, and whether masking it is exact."""
    from depthsearch.run.inspection import inspect_model
    from depthsearch.tables import inspection_tables

    found = inspect_model(
        model,
        context_tokens=context_tokens,
        dtype=dtype,
        device=device,
        revision=revision,
        latency=latency,
    )
    present(found, as_json, inspection_tables)


@app.command()
def latency(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="New file for the table.")],
    context_tokens: ContextTokens = 2048,
    repeats: Annotated[int, typer.Option(min=1, help="Steps to time.")] = 50,
    threads: Annotated[int | None, typer.Option(min=1, help="Processor threads.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Time each sublayer in decoding steps of a model, on the machine that is to serve.

    Searches with a keep_latency budget count in the table that this writes (space.latency).
    """
    from depthsearch.run.latency import write_latency
    from depthsearch.tables import latency_lines
    from depthsearch.terminal import stage_bar

    with stage_bar() as bar:
        found = write_latency(
            model,
            out,
            context_tokens=context_tokens,
            repeats=repeats,
            threads=threads,
            dtype=dtype,
            device=device,
            revision=revision,
            on_stage=bar,
        )
    present(found, as_json, latency_lines)
    say(f"Table: {out}", as_json)


@app.command()
def search(config: Config, out: Out, override: Set = None) -> None:
    """Search for the best mask at the configured budget; the result lands in a run directory."""
    from depthsearch.config import load_config
    from depthsearch.report import write_report
    from depthsearch.run.search import search as run_search
    from depthsearch.terminal import search_bar

    settings = load_config(config, override or [])
    with search_bar(settings.search.method) as bar:
        run_search(settings, out, on_progress=bar, finish=write_report)
    finished(out)


@app.command()
def resume(run: Run) -> None:
    """Continue a search that was interrupted or killed; the result is the same as without."""
    from depthsearch.report import write_report
    from depthsearch.run.search import resume as resume_search
    from depthsearch.run.search import run_config
    from depthsearch.terminal import search_bar

    with search_bar(run_config(run).search.method) as bar:
        resume_search(run, on_progress=bar, finish=write_report)
    finished(run)


@app.command()
def compare(config: Config, out: Unfinished, override: Set = None, as_json: Json = False) -> None:
    """Run several methods at equal cost, with several seeds and at one or more budgets, and compare
    them on held-out text.

    An interrupted comparison is continued by the same command.
    """
    from depthsearch.config import load_config
    from depthsearch.report import compare_report, write_report
    from depthsearch.run.compare import compare as run_compare
    from depthsearch.tables import compare_lines
    from depthsearch.terminal import arm_bars

    settings = load_config(config, override or [])
    with arm_bars() as (on_arm, on_heldout):
        result = run_compare(
            settings, out, on_arm=on_arm, on_heldout=on_heldout, finish=write_report
        )
    compare_report(result, out / "report.html")
    present(result, as_json, compare_lines)
    say(f"Report: {out / 'report.html'}", as_json)


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="Directory of the new checkpoint.")],
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier export.")] = False,
    measure: Annotated[bool, typer.Option(help="Measure it beside the dense model.")] = True,
    repeats: Repeats = 5,
    point: Annotated[
        int | None, typer.Option(min=1, help="Point of a run over several budgets, by its number.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="The same by its budget: keep_params=0.8, or a pair with a comma."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the best mask of a run as a smaller checkpoint, proven equal to the masked model."""
    from depthsearch.run.figures import export_run
    from depthsearch.tables import figures_table, prediction_text
    from depthsearch.terminal import stage_bar

    if point is not None and budget is not None:
        raise InputError("--point and --budget name the same thing: give one of them")
    with stage_bar() as bar:
        result, summary = export_run(
            run,
            out,
            overwrite=overwrite,
            measure=measure,
            repeats=repeats,
            on_stage=bar,
            point=point,
            budget=budget,
        )
    lines: list[Any] = [figures_table(summary["rows"])] if summary["rows"] else []
    if result.unmeasured is not None:
        lines.append(f"Not measured: {result.unmeasured}")
    if summary["unrecorded"] is not None:
        lines.append(f"Not in the report of the run: {summary['unrecorded']}")
    lines += [prediction_text(summary["latency"])] if summary["latency"] else []
    if result.verification is not None:
        lines.append(f"Equal to the masked model: {result.verification.text}")
    lines.append(f"{result.parameters:,} parameters, {len(result.plan.pairs)} blocks in {out}")
    present(summary, as_json, lambda _: lines)


@app.command()
def front(run: Run, as_json: Json = False) -> None:
    """List the points of a run over several budgets: the best mask at each, by number."""
    from depthsearch.run.directory import FRONT, understood
    from depthsearch.run.front import read_front
    from depthsearch.tables import front_table

    found = read_front(run)
    with understood(run / FRONT):
        table = front_table(found)
    present(found, as_json, lambda _: [table])


@app.command()
def evaluate(
    model: Model,
    text: Annotated[str, typer.Option(help="Held-out text: a file, a folder or a hub data set.")],
    column: Annotated[str | None, typer.Option(help="Column that holds the text.")] = None,
    target_column: Annotated[
        str | None,
        typer.Option(help="Column of what should be written for it; encoder-decoders need one."),
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="What the model reads; {source} stands for the text in --column.")
    ] = "{source}\n",
    chat: Annotated[
        bool, typer.Option(help="The prompt is a message in the chat template.")
    ] = False,
    source_language: Annotated[
        str | None, typer.Option(help="Language of --column, as the tokenizer calls it.")
    ] = None,
    target_language: Annotated[
        str | None, typer.Option(help="Language of --target-column, likewise.")
    ] = None,
    written: Annotated[
        int, typer.Option(min=0, help="Texts that the model also writes itself, for chrF++.")
    ] = 0,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of such a text at most.")] = 128,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "test",
    subset: Annotated[str | None, typer.Option(help="Subset of a hub data set.")] = None,
    revision: Revision = None,
    beside: Annotated[
        str | None, typer.Option(help="The dense model, measured in turns in the same run.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of text to score.")] = 16384,
    window_tokens: Annotated[int, typer.Option(min=2, help="Window length.")] = 512,
    dtype: Dtype = "auto",
    device: Device = "auto",
    repeats: Repeats = 5,
    as_json: Json = False,
) -> None:
    """Measure perplexity, size, speed and memory of a checkpoint.

    With --target-column it is scored on the targets alone, each behind its source or prompt; with
    --written also by chrF++ of what it writes for them. The other options of both need
    --target-column.
    """
    from depthsearch.run.evaluating import Targets, evaluate_checkpoint
    from depthsearch.tables import figures_table
    from depthsearch.terminal import stage_bar

    targets = None
    if target_column is not None:
        languages = (source_language, target_language)
        targets = Targets(target_column, prompt, chat, languages, written, new_tokens)
    elif prompt != "{source}\n" or chat or source_language or target_language or written:
        raise InputError(
            "--prompt, --chat, --written and the languages need --target-column: name the column "
            "with what should be written"
        )
    with stage_bar() as bar:
        found = evaluate_checkpoint(
            model,
            text,
            column=column,
            targets=targets,
            split=split,
            subset=subset,
            revision=revision,
            beside=beside,
            window_tokens=window_tokens,
            tokens=tokens,
            dtype=dtype,
            device=device,
            repeats=repeats,
            on_stage=bar,
        )
    present(found, as_json, lambda data: [figures_table(data["rows"])])


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Hub id, directory or GGUF file.")],
    out: Annotated[Path, typer.Argument(help="New jsonl file; never an existing one.")],
    tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 32768,
    window_tokens: Annotated[int, typer.Option(help="Length of one text at most.")] = 256,
    seed: Annotated[int, typer.Option(help="The same gives the same text on one machine.")] = 0,
    temperature: Annotated[float, typer.Option(help="Of the sampling; 1 is the model's own.")] = 1,
    start: Annotated[
        str | None, typer.Option(help="What every text begins with; left out, the first token.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Texts written at a time.")] = 32,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Have a model write text of its own, for repairs to be fitted on (calibration.fit_text).

    A repair carries over to the kinds of text that it was fitted on; a model's own text is a
    sample of all kinds that it knows.
    """
    from depthsearch.run.generation import GenerateOptions
    from depthsearch.run.generation import generate as run_generate
    from depthsearch.terminal import stage_bar

    options = GenerateOptions(tokens, window_tokens, seed, temperature, start, batch)
    with stage_bar() as bar:
        found = run_generate(
            model, out, options, dtype=dtype, device=device, revision=revision, on_text=bar
        )
    said = f"{found['texts']:,} texts of {found['tokens']:,} tokens in {out}"
    present(found, as_json, lambda _: [said])


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Directory of a run, comparison or check.")],
) -> None:
    """Write report.html of a run, finished or not, of a comparison or of a calibration check."""
    from depthsearch.report import calibration_report, compare_report, write_report
    from depthsearch.run.compare import read_compare
    from depthsearch.run.directory import CALIBRATION, COMPARE, read_json

    if (run / COMPARE).exists():
        compare_report(read_compare(run), run / "report.html")
        path = run / "report.html"
    elif (run / CALIBRATION).exists():
        found = read_json(run / CALIBRATION, "it is no finished calibration check")
        path = calibration_report(found, run / "report.html")
    else:
        path = write_report(run)
    typer.echo(path)


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="Run directory, or directory of a comparison.")],
    once: Annotated[bool, typer.Option("--once", help="Show one state and end.")] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, max=86400, help="Seconds between two looks.")
    ] = 2.0,
    as_json: Json = False,
) -> None:
    """Show where a search or comparison stands, from any machine that sees its directory.

    Reads only; the search goes on when this ends. --json prints one state and ends.
    """
    from depthsearch.live import follow, show
    from depthsearch.run.watching import Watcher

    watcher = Watcher(run)
    if as_json:
        typer.echo(json.dumps(watcher.look().to_json(), indent=2, ensure_ascii=False))
    elif once:
        show(watcher.look())
    else:
        try:
            follow(watcher, interval)
        except KeyboardInterrupt:
            fail("no longer watching; the search itself is not touched", _INTERRUPTED)


@app.command()
def feed(
    run: Run,
    workers: Annotated[
        str, typer.Option(help="Numbers of workers to try.")
    ] = "1,2,4,8,16,32,64,128,256",
    as_json: Json = False,
) -> None:
    """Tell how many workers a search could have fed, from the journal of its run.

    Simulates them on what the search asked for, finished or not; needs no model and no cluster.
    """
    from depthsearch.run.feeding import feeding, parse_counts
    from depthsearch.tables import feeding_table
    from depthsearch.terminal import stage_bar

    counts = parse_counts(workers)
    with stage_bar() as bar:
        found = feeding(run, counts, lambda done, total: bar("simulating", done, total))
    present(found, as_json, lambda data: [feeding_table(data), data["verdict"], *data["notes"]])


@app.command()
def overfit(
    run: Run,
    fit: Annotated[
        str, typer.Option(help="Sizes of the text to fit on, in tokens.")
    ] = "1024,4096,16384,65536",
    other: Annotated[
        str | None, typer.Option(help="Text of another kind: a file, a folder or a hub data set.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column of it that holds the text.")] = None,
    repair: Annotated[
        str | None, typer.Option(help="gap or sequential; left out, as the run repairs.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell whether the repair of a run's best mask overfits, and how much text it needs.

    Repairs it on less and more text, and shows what it loses on that text, on held-out text of the
    same source and on `--other` text. The curve goes into the report of the run.
    """
    from depthsearch.report import write_report
    from depthsearch.run.overfit import overfit as run_overfit
    from depthsearch.run.overfit import parse_sizes
    from depthsearch.tables import overfit_table
    from depthsearch.terminal import stage_bar

    sizes = parse_sizes(fit)
    with stage_bar() as bar:
        found = run_overfit(run, sizes, other=other, column=column, kind=repair, on_stage=bar)
    path = write_report(run)
    present(found, as_json, lambda data: [overfit_table(data), data["verdict"]])
    say(f"Report: {path}", as_json)


@app.command()
def calibrate_check(
    config: Config,
    out: Unfinished,
    run: Annotated[
        Path | None, typer.Option(help="Run directory whose best masks are taken in.")
    ] = None,
    masks: Annotated[
        int, typer.Option(help="Masks to rank; half of them at most are cheap baselines.")
    ] = 24,
    draws: Annotated[int, typer.Option(help="Samples of calibration.select_tokens.")] = 4,
    folds: Annotated[int, typer.Option(help="Parts of a sample that are left out in turn.")] = 4,
    lengths: Annotated[
        str | None, typer.Option(help="Window lengths; left out, 128,256,512,1024.")
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Sizes of text in tokens; left out, 512, 1024 and so on.")
    ] = None,
    other: Annotated[
        list[str] | None, typer.Option(help="Text of another kind. May be repeated.")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="Columns of the other texts, in their order.")
    ] = None,
    override: Set = None,
    as_json: Json = False,
) -> None:
    """Tell whether the ranking of masks, and the winner, depend on the sample of text.

    Judges one set of masks on several samples of the calibration text, in windows of several
    lengths, on `--other` texts and on held-out text, and says how much text to select on. An
    interrupted check is continued by the same command.
    """
    from depthsearch.config import load_config
    from depthsearch.report import calibration_report
    from depthsearch.run.calibration_check import check_calibration
    from depthsearch.run.calibration_texts import CheckOptions, other_texts, parse_numbers
    from depthsearch.tables import calibration_tables
    from depthsearch.terminal import stage_bar

    options = CheckOptions(
        masks, draws, folds, parse_numbers(lengths, "lengths"), parse_numbers(sizes, "sizes")
    )
    others = other_texts(other or [], column or [])
    settings = load_config(config, override or [])
    with stage_bar() as bar:
        found = check_calibration(settings, out, options, run=run, others=others, on_stage=bar)
    calibration_report(found, out / "report.html")
    present(found, as_json, calibration_tables)
    say(f"Report: {out / 'report.html'}", as_json)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; errors end it with one line and their exit code."""
    try:
        with quiet():
            # Left alone typer would put wrong usage into a box of several lines.
            code = app(standalone_mode=False)
        # Inside a command typer turns Ctrl-C into an exit without a word.
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            raise Ended(code)
    except DepthsearchError as error:
        fail(str(error), error.exit_code)
    except _USAGE as error:
        message = " ".join(error.format_message().split())
        # Without arguments typer has shown the help already.
        if not message:
            raise Ended(error.exit_code) from error
        fail(message, error.exit_code)
    except KeyboardInterrupt:
        fail(f"interrupted; {CONTINUED}", _INTERRUPTED)
    except OSError as error:
        if is_disk_full(error):
            fail(f"the disk is full: {error}", StorageError.exit_code)
        if error.errno not in _OUT_OF_REACH or error.filename is None:
            raise
        fail(f"cannot look at {error.filename}: {error.strerror}", StorageError.exit_code)


if __name__ == "__main__":
    main()
