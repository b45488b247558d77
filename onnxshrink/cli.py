"""The command line: arguments in, text and an exit code out.

Exit codes: 0 done; 2 usage, inputs or output place; 3 a pass that was asked for did not stay within the limits or did not reach
its own target (the best found is written all the same); 4 validation failed; 5 the model cannot be used; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from onnxshrink.errors import OptionError, OutputError, ShrinkError, must

if TYPE_CHECKING:
    from onnxshrink.recipe import Recipe
    from onnxshrink.validate import Tolerance

__all__ = ["app", "main"]

_P = ParamSpec("_P")
_TRACEBACK_VARIABLE = "ONNXSHRINK_TRACEBACK"
_TARGET_MISSED, _INVALID, _INTERRUPTED = 3, 4, 130

app = typer.Typer(
    name="onnxshrink",
    help="Makes ONNX models smaller and faster after training, and proves that they still work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file.")]
OutPath = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Where to write the result.")]
AsJson = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON instead of tables.")]
MinSqnr = Annotated[float | None, typer.Option(metavar="DB", min=-300.0, max=300.0, help="Least SQNR of any output, in dB.")]
MaxDrift = Annotated[float | None, typer.Option(metavar="X", min=0.0, help="Greatest relative L2 error of any output.")]
MinAgreement = Annotated[
    float | None, typer.Option(metavar="F", min=0.0, max=1.0, help="Least share of equal top-1 classes, 0 to 1.")
]
InputsPath = Annotated[
    Path | None, typer.Option(metavar="PATH", help="Inputs: .npz, a folder of .npz, or ONNX test_data_set folders.")
]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Seed of all randomness.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from onnxshrink import __version__

        sys.stdout.write(f"onnxshrink {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Makes ONNX models smaller and faster after training, and proves that they still work."""


def main() -> None:
    """Runs the command line."""
    _keep_stdout()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: temporary files, of gigabytes maybe, must go
    app()


def _keep_stdout() -> None:
    """Keeps standard output for results: what native libraries print there (the ONNX checker does) goes to stderr."""
    try:
        own = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # one of the two is closed
        return
    sys.stdout = os.fdopen(own, "w", encoding=sys.stdout.encoding, errors="replace")


def _guarded(command: Callable[_P, None]) -> Callable[_P, None]:
    """Turns every failure into one line on stderr and the right exit code."""

    @functools.wraps(command)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except typer.Exit:  # an Exception too
            raise
        except ShrinkError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail("interrupted", _INTERRUPTED)
        except MemoryError:
            _fail("out of memory", 1)
        except Exception as error:  # the last resort: a person gets a line, and a way to get more
            if os.environ.get(_TRACEBACK_VARIABLE):
                traceback.print_exc()
            _fail(f"internal error: {type(error).__name__}: {error}; {_TRACEBACK_VARIABLE}=1 shows where", 1)

    return guarded


@app.command()
@_guarded
def compress(
    model: ModelPath,
    output: OutPath,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="Passes and limits from a TOML file.")] = None,
    passes: Annotated[
        list[str] | None,
        typer.Option("--pass", metavar="NAME[:key=value,...]", help="A pass to run, after those of the recipe; repeatable."),
    ] = None,
    calib: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Sample inputs: .npz, a folder of .npz, or test_data_set folders.")
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Other inputs to judge the result by; without them a quarter of --calib is held out."),
    ] = None,
    min_sqnr: MinSqnr = None,
    max_drift: MaxDrift = None,
    min_agreement: MinAgreement = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE.json|.md", help="Write the full report.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Compress a model and check the result against the original.

    Without --recipe and --pass it tidies the graph, shares weights and Huffman codes them, held to the limits or 30 dB SQNR:
    with as few bits as that takes when there are sample inputs, with 8 bits when there are none.
    """
    from onnxshrink import api, tables
    from onnxshrink.graph.files import atomic_file, check_output

    read = [path for path in (model, recipe, calib, validation) if path is not None]
    check_output(output, inputs=read)
    if report is not None:
        _check_report_path(report, inputs=[*read, output])
    chosen, limits = _plan(recipe, passes or [], min_sqnr, max_drift, min_agreement)
    with _progress(as_json) as progress:
        result = api.compress(
            model, chosen, calibration=calib, validation=validation, tolerance=limits, seed=seed, progress=progress
        )
        written = result.save(output)
    if report is not None:
        text = result.report.to_json() + "\n" if report.suffix == ".json" else result.report.to_markdown()
        with atomic_file(report) as file:
            file.write(text.encode())
    plain = {"output": str(output), **result.report.to_dict()}
    _show(as_json, plain, lambda: tables.compression(result.report, _places(output, written)))
    if not result.report.target_reached:
        raise typer.Exit(_TARGET_MISSED)


@app.command()
@_guarded
def verify(
    original: Annotated[Path, typer.Argument(metavar="ORIGINAL", help="The model as it was.")],
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="The model to judge.")],
    inputs: InputsPath = None,
    min_sqnr: MinSqnr = None,
    max_drift: MaxDrift = None,
    min_agreement: MinAgreement = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Compare two models on the same inputs; exit code 4 when a limit is broken."""
    from onnxshrink import api, tables
    from onnxshrink.validate import Tolerance

    limits = Tolerance(min_sqnr, max_drift, min_agreement)
    with _progress(as_json) as progress:
        progress("comparing", 0, 0)
        result = api.verify(original, candidate, inputs=inputs, tolerance=limits, seed=seed)
    _show(as_json, result.to_dict(), lambda: tables.verification(result, limits))
    if result.violation is not None:
        _fail(result.violation, _INVALID)


@app.command()
@_guarded
def inspect(
    model: ModelPath,
    groups: Annotated[
        bool, typer.Option("--groups", metavar="", help="Show the groups of channels that remove-channels cuts together.")
    ] = False,
    ranks: Annotated[
        bool, typer.Option("--ranks", metavar="", help="Show how many dimensions each weight needs, and its outputs with --calib.")
    ] = False,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", metavar="", help="Measure what zeros do, by layer and in the whole model.")
    ] = False,
    calib: Annotated[
        Path | None, typer.Option(metavar="PATH", help="With --sensitivity or --ranks: inputs, as for compress.")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", metavar="", help="With --sensitivity: the whole model with zeros made up for, too.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png|.svg|.pdf", help="With --sensitivity: draw the curves (matplotlib).")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Show the weights of a model: bytes, zeros, entropy, work, and which passes would act on them."""
    from onnxshrink import api, tables

    _check_sensitivity(sensitivity, None if ranks else calib, repair, plot)
    if plot is not None:
        from onnxshrink.plots import check_picture, draw_degradation

        check_picture(plot, [path for path in (model, calib) if path is not None])
    with _progress(as_json) as progress:
        found = api.inspect(
            model, sensitivity=sensitivity, ranks=ranks, calibration=calib, repair=repair, seed=seed, progress=progress
        )
        if plot is not None and found.sensitivity is not None:
            draw_degradation(found.sensitivity, plot, model.name)
    _show(as_json, found.to_dict(), lambda: tables.inspection(found, "" if plot is None else str(plot), with_groups=groups))


@app.command()
@_guarded
def expand(model: ModelPath, output: OutPath, as_json: AsJson = False) -> None:
    """Write a model with plain dense weights, undoing weight sharing and packed zeros."""
    from onnxshrink import api, tables
    from onnxshrink.graph.files import check_output

    check_output(output, inputs=[model])
    result = api.expand(model)
    written = result.save(output)
    _show(as_json, {"output": str(output), **result.to_dict()}, lambda: tables.expansion(result, _places(output, written)))


@app.command()
@_guarded
def bench(
    a: Annotated[Path, typer.Argument(metavar="A", help="The model to compare with.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The model to compare.")],
    inputs: InputsPath = None,
    threads: Annotated[int, typer.Option(metavar="N", min=1, help="Threads within an op.")] = 1,
    seconds: Annotated[float, typer.Option(metavar="S", min=0.1, help="How long to measure.")] = 5.0,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure the latency of two models in interleaved runs."""
    from onnxshrink import api, tables

    with _progress(as_json) as progress:
        progress("measuring", 0, 0)
        result = api.bench(a, b, inputs=inputs, threads=threads, seconds=seconds, seed=seed)
    _show(as_json, {"a": str(a), "b": str(b), **asdict(result)}, lambda: tables.latency(result, str(a), str(b)))


@app.command("passes")
@_guarded
def list_passes(as_json: AsJson = False) -> None:
    """List the passes with their options, ranges and defaults."""
    from onnxshrink import tables
    from onnxshrink.registry import describe_passes

    described = describe_passes()
    _show(as_json, {"passes": [asdict(info) for info in described]}, lambda: tables.passes(described))


@app.command()
@_guarded
def demo(as_json: AsJson = False) -> None:
    """Compress a small trained model that comes with the package, and show its accuracy before and after."""
    from onnxshrink import tables
    from onnxshrink.demo import run_demo

    with _progress(as_json) as progress:
        result = run_demo(progress)
    _show(as_json, result.to_dict(), lambda: tables.demo(result))


def _plan(
    recipe_path: Path | None, texts: list[str], min_sqnr: float | None, max_drift: float | None, min_agreement: float | None
) -> tuple[Recipe | None, Tolerance | None]:
    """Returns what to run and the limits: those of the command line, else the recipe's; None for the defaults."""
    from onnxshrink.contract import Step
    from onnxshrink.recipe import Recipe, parse_pass, read_recipe
    from onnxshrink.validate import Tolerance

    given = Tolerance(min_sqnr, max_drift, min_agreement)
    extra = tuple(Step(parse_pass(text)) for text in texts)
    if recipe_path is None and not extra:
        return None, given if given.is_set else None
    base = read_recipe(recipe_path) if recipe_path is not None else Recipe(())
    chosen = Recipe((*base.steps, *extra), base.tolerance)
    if not chosen.steps:
        raise OptionError(f"recipe {recipe_path}: has no pass, and none was given with --pass: there is nothing to do")
    return chosen, given if given.is_set else base.tolerance


def _check_sensitivity(asked: bool, calib: Path | None, repair: bool, plot: Path | None) -> None:
    for option, value in {"--calib": calib, "--repair": repair or None, "--plot": plot}.items():
        if value is not None and not asked:
            needed = "--sensitivity or --ranks" if option == "--calib" else "--sensitivity"
            raise OptionError(must("inspect", option, f"left out without {needed}", "it"))


def _check_report_path(path: Path, inputs: list[Path]) -> None:
    from onnxshrink.graph.files import check_output

    if path.suffix not in (".json", ".md"):
        raise OptionError(must("--report", "file name", "one that ends in .json or .md", path.name))
    check_output(path, inputs)


def _places(output: Path, written: int) -> str:
    """Returns the files that were written, for people: the model, and its data if not all of it is in there."""
    return str(output) if output.stat().st_size == written else f"{output} and {output}.data"


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Gives a callback that draws a bar on stderr while it is a terminal, and does nothing elsewhere."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda what, done, total: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None)


def _show(as_json: bool, plain: dict[str, Any], table: Callable[[], Any]) -> None:
    if as_json:
        text = json.dumps(plain, indent=2, allow_nan=False) + "\n"
    else:
        with (console := Console()).capture() as capture:
            console.print(table())
        text = capture.get()
    if sys.stdout is None:  # it was closed
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter tries again when it ends
        if not isinstance(error, BrokenPipeError):  # the reader left, as head does
            raise OutputError(f"standard output: cannot be written: {error.strerror}") from error


def _fail(message: str, code: int) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print("[bold red]error:[/] ", end="")
    sys.stderr.write(message + "\n")
    raise typer.Exit(code)
