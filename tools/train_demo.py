"""Train, export and evaluate the bundled model. ``python tools/train_demo.py --help`` lists the commands."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar

import typer

if TYPE_CHECKING:
    import torch

BUNDLED = Path(__file__).resolve().parents[1] / "patchpipe" / "demo" / "model"
CACHE = Path.home() / ".cache" / "patchpipe-demo-training"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")

DataArgument = Annotated[Path, typer.Argument(help="Folder that `prepare` wrote.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")]
ThreadsOption = Annotated[int, typer.Option(help="CPU threads; 0 leaves it to PyTorch.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]


@app.callback()
def main() -> None:
    """The bundled model's training program.

    A whole training, on a GPU:

        python tools/train_demo.py prepare out/data --size 128 --size 256 --concepts all

        python tools/train_demo.py autoencoder out/data out/vae --plan gpu --minutes 6

        python tools/train_demo.py transformer out/data out/run --autoencoder out/vae --plan gpu --minutes 25

        python tools/train_demo.py evaluate out/run/pipeline --data out/data --sheet out/sheet.png
    """


def _plain_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn expected errors into one line and exit code 1."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (OSError, RuntimeError, ValueError) as error:
            typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(1) from error

    return wrapped


def _device(name: str, threads: int) -> torch.device:
    import torch

    _quieten()
    if threads:
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("this PyTorch sees no CUDA device; use --device cpu")
    return torch.device(name)


def _quieten() -> None:
    import diffusers
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*fused implementation.*")
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


@app.command()
@_plain_errors
def prepare(
    out: Annotated[Path, typer.Argument(help="Folder for the arrays and their index.")],
    concepts: Annotated[
        str, typer.Option(help="File of concept names, or `all`: every object drawn in all four styles.")
    ] = str(BUNDLED / "concepts.txt"),
    held_out: Annotated[Path, typer.Option(help="Captions to keep out of training.")] = BUNDLED / "heldout.txt",
    size: Annotated[list[int] | None, typer.Option(help="Side in pixels: 128, and again for 256.")] = None,
    cache: Annotated[Path, typer.Option(help="Where the icon packages are kept.")] = CACHE,
    workers: Annotated[int, typer.Option(help="Processes that rasterise.")] = os.cpu_count() or 1,
) -> None:
    """Fetch the four icon packages with npm and rasterise them.

    Examples:

        python tools/train_demo.py prepare out/data

        python tools/train_demo.py prepare out/data --size 128 --size 256 --concepts all
    """
    from demo_training import prepare as steps
    from demo_training.console import table

    sizes = sorted({128, *(size or [])})
    if set(sizes) - {128, 256}:
        raise ValueError(f"--size must be 128 or 256, got {sizes}")
    names = None if concepts == "all" else Path(concepts)
    entries = steps.prepare(out, cache, names, held_out, sizes, workers)
    columns = ("style", "autoencoder", "transformer", "held out")
    table(f"{len(entries)} pictures in {out}", columns, steps.summary(entries))


@app.command()
@_plain_errors
def autoencoder(
    data: DataArgument,
    out: Annotated[Path, typer.Argument(help="Folder for the trained autoencoder.")],
    plan: Annotated[str, typer.Option(help="cpu (crops, 1.7 M parameters) or gpu (whole pictures, wider).")] = "cpu",
    minutes: Annotated[float, typer.Option(help="How long to train.")] = 12.0,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    seed: SeedOption = 0,
) -> None:
    """Train the autoencoder and measure it on the held-out pictures.

    Examples:

        python tools/train_demo.py autoencoder out/data out/vae --minutes 12

        python tools/train_demo.py autoencoder out/data out/vae --plan gpu --minutes 6 --device cuda
    """
    from demo_training import autoencoder as ae
    from demo_training.console import CONSOLE
    from demo_training.dataset import load_pictures

    if plan not in ae.AUTOENCODER_PLANS:
        raise ValueError(f"unknown plan {plan!r}; the plans are {', '.join(ae.AUTOENCODER_PLANS)}")
    pictures = load_pictures(data)
    where = _device(device, threads)
    vae = ae.train_autoencoder(pictures, ae.AUTOENCODER_PLANS[plan], minutes, where, seed)
    held = pictures.pick(held_out=True)
    CONSOLE.print(f"PSNR of {len(held.entries)} held-out pictures: {ae.psnr(vae, held):.2f} dB")
    ae.save_autoencoder(vae, out)


@app.command()
@_plain_errors
def transformer(
    data: DataArgument,
    out: Annotated[Path, typer.Argument(help="Folder for the run: checkpoint and pipeline.")],
    plan: Annotated[
        str | None, typer.Option(help="cpu, gpu or continue. Default: by --resume, else by the device.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Length of the whole schedule.", show_default="58")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="A pipeline folder to continue from, or a run folder to go on with.")
    ] = None,
    autoencoder: Annotated[Path, typer.Option(help="A trained autoencoder, or a pipeline that has one.")] = BUNDLED,
    tokenizers: Annotated[
        Path | None,
        typer.Option(help="Pipeline folder whose tokenizers to reuse. Default: built from the captions."),
    ] = None,
    shape: Annotated[str, typer.Option(help="Heads of 64, double blocks, single blocks.")] = "4,3,6",
    variants: Annotated[int, typer.Option(help="Moved copies of each picture, against memorising.")] = 1,
    compile: Annotated[bool | None, typer.Option(help="Compile the blocks. Default: on CUDA only.")] = None,
    save_every: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 5.0,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    seed: SeedOption = 0,
) -> None:
    """Train the transformer and both text encoders together.

    Examples:

        python tools/train_demo.py transformer out/data out/run --autoencoder out/vae --minutes 58

        python tools/train_demo.py transformer out/data out/more --resume patchpipe/demo/model --minutes 3

        python tools/train_demo.py transformer out/data out/run --resume out/run

        python tools/train_demo.py transformer out/data out/run --autoencoder out/vae --plan gpu --minutes 25
    """
    from demo_training import runs
    from demo_training.console import CONSOLE
    from demo_training.model import Shape

    request = runs.Request(
        data=data,
        out=out,
        device=_device(device, threads),
        plan=plan,
        minutes=minutes,
        resume=resume,
        autoencoder=autoencoder,
        tokenizers=tokenizers,
        shape=Shape.parse(shape),
        variants=variants,
        compile=compile,
        save_every=save_every,
        seed=seed,
    )
    CONSOLE.print(f"pipeline with the averaged weights: {runs.train(request)}")


@app.command()
@_plain_errors
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")],
    out: Annotated[Path, typer.Argument(help="Folder for the pipeline.")],
) -> None:
    """Write the averaged weights of a run's last checkpoint as a FluxPipeline folder (bf16).

    Examples:

        python tools/train_demo.py export out/run out/model
    """
    from demo_training.console import CONSOLE
    from demo_training.runs import export_run

    _quieten()
    export_run(run, out)
    CONSOLE.print(f"wrote {out}")


@app.command()
@_plain_errors
def evaluate(
    model: Annotated[Path, typer.Argument(help="Pipeline folder.")] = BUNDLED,
    data: Annotated[
        Path | None, typer.Option(help="Folder that `prepare` wrote; needed for losses and retrieval.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="Paint a sheet of 24 pictures into this PNG.")] = None,
    retrieval: Annotated[int, typer.Option(help="Held-out captions to paint and look up; 0 for none.")] = 0,
    distractors: Annotated[int, typer.Option(help="Untrained concepts added to the real pictures.")] = 232,
    draws: Annotated[int, typer.Option(help="Noises per picture and level for the losses.")] = 4,
    guidance: Annotated[float, typer.Option(help="true_cfg_scale.")] = 3.0,
    size: Annotated[int, typer.Option(help="Side of the painted pictures in pixels.")] = 128,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
) -> None:
    """Measure a model: flow loss on seen and held-out pairs, a picture sheet, retrieval.

    Examples:

        python tools/train_demo.py evaluate --data out/data

        python tools/train_demo.py evaluate out/run/pipeline --sheet out/sheet.png

        python tools/train_demo.py evaluate out/run/pipeline --data out/data --retrieval 60
    """
    if data is None and (retrieval or sheet is None):
        raise ValueError("losses and retrieval need --data FOLDER (see prepare); without it, give --sheet FILE")
    where = _device(device, threads)
    from demo_training import report
    from demo_training.model import load_pipeline

    if retrieval:
        report.require_features()
    pipe = load_pipeline(model).to(where)
    if data is not None:
        report.print_losses(pipe, data, draws)
    if sheet is not None:
        report.write_sheet(pipe, sheet, model, size, guidance)
    if data is not None and retrieval:
        report.print_retrieval(pipe, data, retrieval, distractors, guidance)


if __name__ == "__main__":
    sys.exit(app())
