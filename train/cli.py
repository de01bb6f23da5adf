"""The command `l2p`: parses arguments and dispatches. Each command's work is in a module of its own, imported when
it runs, so that `l2p --help` needs no torch and answers at once."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .. import __version__
from ..l2p_core.paths import typed
from . import file_commands
from .arguments import Commands as _Commands
from .arguments import add_recipe as _add_recipe
from .arguments import command as _command
from .arguments import positive as _positive
from .arguments import positive_number as _positive_number

EXIT_MISTAKE = 2
EXIT_FAILURE = 1
EXIT_INTERRUPT = 130  # what shells report for SIGINT


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_MISTAKE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a user's mistake, 1 for a failed run, 130 for Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Into a file or pipe Windows writes its old code page, which lacks most letters that a path may have.
        sys.stdout.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    try:
        args.command(args)
        print(end="", flush=True)
        return 0
    except KeyboardInterrupt:
        return _complain("stopped.", EXIT_INTERRUPT)
    except BrokenPipeError:
        return _reader_has_gone()
    except ModuleNotFoundError as error:
        if args.debug or error.name not in ("torch", "matplotlib"):
            raise
        return _complain(
            f"this command needs {error.name}: install this package with its extra 'standalone'.", EXIT_FAILURE
        )
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and _is_of_a_closed_pipe(error):
            return _reader_has_gone()
        if args.debug:
            raise
        return _complain(_one_line(error), EXIT_MISTAKE)
    except RuntimeError as error:
        # Torch reports a full memory, and the trainer a diverged run, in this way; other kinds are our own faults.
        if args.debug or not _is_failure_of_the_run(error):
            raise
        return _complain(_one_line(error), EXIT_FAILURE)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(prog="l2p", description="Turn latent diffusion transformers into pixel generators (L2P).")
    parser.add_argument("--version", action="version", version=f"l2p {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        _add_demo,
        file_commands.add_inspect,
        file_commands.add_convert,
        _add_synth,
        _add_cache,
        _add_plan,
        _add_train,
        file_commands.add_merge,
        file_commands.add_delta,
        _add_sample,
        _add_benchmark,
    ):
        add(commands)
    return parser


def _add_demo(commands: _Commands) -> None:
    parser = _command(commands, "demo", "convert, train, sample, score and draw the bundled tiny model, live")
    parser.add_argument("--output", type=typed, default=Path("demo"), help="folder for the figure and all files")
    parser.add_argument("--steps", type=_positive, default=None, help="training steps (default: as the recipe)")
    parser.add_argument("--seed", type=int, default=0, help="of the initialisation, the training and the samples")

    def run(args: argparse.Namespace) -> None:
        from .demo import demo

        demo(args.output, steps=args.steps, seed=args.seed)

    parser.set_defaults(command=run)


def _add_synth(commands: _Commands) -> None:
    parser = _command(commands, "synth", "make the images to train on: in running hosts, or with the bundled source")
    parser.add_argument(
        "source", type=typed, metavar="SOURCE", help="ComfyUI workflow in API format with {prompt} in a text, or 'tiny'"
    )
    parser.add_argument("output", type=typed, metavar="FOLDER", help="where the images and metadata.csv go")
    parser.add_argument("--prompts", type=typed, default=None, metavar="FILE", help="text file, one a line, or a table")
    parser.add_argument("--seeds", type=_positive, default=1, metavar="N", help="images of each prompt")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of each prompt's first image")
    parser.add_argument(
        "--host", action="append", default=[], metavar="ADDRESS", help="of a running ComfyUI; several share the work"
    )
    parser.add_argument("--patience", type=float, default=60, metavar="SECONDS", help="for a host that does not answer")
    parser.add_argument("--steps", type=_positive, default=None, help="with 'tiny': Euler steps")
    parser.add_argument("--cfg", type=float, default=None, help="with 'tiny': guidance")

    def run(args: argparse.Namespace) -> None:
        from .synth import synth_command

        synth_command(args)

    parser.set_defaults(command=run)


def _add_cache(commands: _Commands) -> None:
    parser = _command(commands, "cache", "look at a recipe's images and encode their captions, before training")
    _add_recipe(parser)

    def run(args: argparse.Namespace) -> None:
        from .run import Places, cache

        cache(args.recipe, args.output, Places(args.base, args.data, args.encoder))

    parser.set_defaults(command=run)


def _add_plan(commands: _Commands) -> None:
    parser = _command(commands, "plan", "say what a recipe needs of memory, before anything is there or loaded")
    _add_recipe(parser, output=False)
    parser.add_argument("--gpu-memory", type=_positive_number, default=None, metavar="GB", help="that it must fit into")
    parser.add_argument("--cards", action="store_true", help="print what makes it fit into usual GPUs")

    def run(args: argparse.Namespace) -> None:
        from .plan import plan_command
        from .run import Places

        plan_command(args.recipe, Places(args.base, args.data, args.encoder), args.gpu_memory, args.cards)

    parser.set_defaults(command=run)


def _add_train(commands: _Commands) -> None:
    parser = _command(commands, "train", "train as a recipe says; started again, it goes on where it stopped")
    _add_recipe(parser)
    parser.add_argument("--restart", action="store_true", help="begin anew; the run in the folder is moved aside")

    def run(args: argparse.Namespace) -> None:
        from .run import Places, train

        train(args.recipe, args.output, args.restart, Places(args.base, args.data, args.encoder))

    parser.set_defaults(command=run)


def _add_sample(commands: _Commands) -> None:
    parser = _command(commands, "sample", "generate PNG images with an L2P model")
    parser.add_argument(
        "model",
        type=typed,
        nargs="?",
        default=Path("tiny"),
        metavar="MODEL",
        help="safetensors file or folder of shards; 'tiny' is the bundled source with its delta",
    )
    parser.add_argument("--delta", type=typed, default=None, help="put this delta onto MODEL first")
    parser.add_argument("--prompt", default=None, help="caption in words, for the tiny model")
    parser.add_argument(
        "--caption-features", type=typed, default=None, metavar="FILE",
        help="safetensors file with text encoder states 'positive' and, for guidance, 'negative', each (L, width)",
    )  # fmt: skip
    parser.add_argument("--output", type=typed, default=Path("l2p.png"), help="PNG file; several seeds are numbered")
    parser.add_argument("--width", type=_positive, default=None, help="pixels, any number (default: of the variant)")
    parser.add_argument("--height", type=_positive, default=None, help="pixels, any number (default: of the variant)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one image for each")
    parser.add_argument("--steps", type=_positive, default=None, help="Euler steps (default: of the variant)")
    parser.add_argument("--cfg", type=float, default=None, help="guidance (default: of the variant)")
    parser.add_argument("--shift", type=float, default=None, help="of the schedule (default: of the variant)")
    parser.add_argument("--init", type=typed, default=None, help="image to start from, resized to the size asked for")
    parser.add_argument("--denoise", type=float, default=1.0, help="with --init: share of the schedule, above 0 to 1")
    parser.add_argument("--tile", type=_positive, default=None, help="side in pixels of the head's tiles")
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda")
    parser.add_argument("--overwrite", action="store_true", help="replace images that exist")

    def run(args: argparse.Namespace) -> None:
        from .sample import sample_command

        sample_command(args)

    parser.set_defaults(command=run)


def _add_benchmark(commands: _Commands) -> None:
    parser = _command(commands, "benchmark", "measure this machine and the method")
    kinds = parser.add_subparsers(title="benchmarks", metavar="KIND", required=True)

    head = _command(kinds, "head", "the Detailer Head: memory format, tiles, and a 10240-pixel image in little memory")
    head.add_argument("--quick", action="store_true", help="small sizes: a check that it runs, not a measurement")
    head.add_argument("--json", type=typed, default=None, metavar="FILE", help="write the results here too")

    def run_head(args: argparse.Namespace) -> None:
        from .benchmark.head import benchmark_head

        benchmark_head(quick=args.quick, json_file=args.json)

    head.set_defaults(command=run_head)

    train = _command(kinds, "train", "time and memory of training against the plain way of the published trainer")
    train.add_argument("--quick", action="store_true", help="small sizes: a check that it runs, not a measurement")
    train.add_argument("--precision", choices=["bf16", "fp32"], default=None, help="default: as the processor can")
    train.add_argument("--device", default=None, help="torch device, such as cpu or cuda (default: a GPU if any)")
    train.add_argument("--json", type=typed, default=None, metavar="FILE", help="write the results here too")

    def run_train(args: argparse.Namespace) -> None:
        from .benchmark.train import benchmark_train

        benchmark_train(quick=args.quick, precision=args.precision, device=args.device, json_file=args.json)

    train.set_defaults(command=run_train)

    gpu = _command(kinds, "gpu", "the 6B model on this GPU: exactness, speed and memory of sampling and training")
    gpu.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder for gpu.md and gpu.json")
    gpu.add_argument("--parts", default=None, metavar="NAME,...", help="parts to run (default: all)")
    gpu.add_argument("--list", action="store_true", help="print the parts and their rows, and measure nothing")
    gpu.add_argument("--minutes", type=_positive_number, default=8.0, help="after which the rest is skipped")
    gpu.add_argument("--model", type=Path, default=None, metavar="FILE", help="an L2P model (default: random weights)")
    gpu.add_argument("--device", default=None, help="torch device, such as cuda (default: a GPU if any)")
    gpu.add_argument("--quick", action="store_true", help="small sizes: a check that it runs, not a measurement")

    def run_gpu(args: argparse.Namespace) -> None:
        from .benchmark.gpu import benchmark_gpu, listed

        if args.list:
            print(listed())
            return
        parts = None if args.parts is None else [name.strip() for name in args.parts.split(",")]
        benchmark_gpu(args.output, parts, args.minutes, args.quick, args.model, args.device)

    gpu.set_defaults(command=run_gpu)

    checkpoint = _command(kinds, "checkpoint", "speed and memory of conversion, delta and merge")
    checkpoint.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint to make")
    checkpoint.add_argument("--folder", type=typed, default=None, help="where to make it (default: temporary folder)")

    def run_checkpoint(args: argparse.Namespace) -> None:
        from .benchmark.checkpoint import benchmark_checkpoint

        benchmark_checkpoint(gigabytes=args.gigabytes, folder=args.folder)

    checkpoint.set_defaults(command=run_checkpoint)

    transfer = _command(kinds, "transfer", "what transfer keeps of the tiny source, and the ablations, in small")
    transfer.add_argument(
        "--output", type=typed, default=Path("runs/transfer"), help="folder; finished stages are kept"
    )
    transfer.add_argument("--steps", type=_positive, default=None, help="of the main run (default: as the recipe)")
    transfer.add_argument("--ablation-steps", type=_positive, default=None, help="of each ablation")
    transfer.add_argument("--renderings", action="store_true", help="also train on clean renderings, to compare")
    transfer.add_argument("--write-delta", type=typed, default=None, metavar="FILE", help="also write the delta here")

    def run_transfer(args: argparse.Namespace) -> None:
        from .benchmark.transfer import benchmark_transfer

        benchmark_transfer(
            args.output,
            steps=args.steps,
            ablation_steps=args.ablation_steps,
            renderings=args.renderings,
            write_delta=args.write_delta,
        )

    transfer.set_defaults(command=run_transfer)


def _is_failure_of_the_run(error: RuntimeError) -> bool:
    from ..l2p_core.parallel import ProcessLost
    from ..l2p_core.run.planning import MemoryRanOut
    from ..l2p_core.trainer import TrainingDiverged

    ours = isinstance(error, (TrainingDiverged, ProcessLost, MemoryRanOut))
    return ours or "allocate" in str(error) or "out of memory" in str(error)


def _is_of_a_closed_pipe(error: OSError) -> bool:
    """Whether this is how Windows says that stdout's reader has gone: python/cpython#79935."""
    if os.name != "nt" or error.errno != errno.EINVAL or error.filename:
        return False
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def _reader_has_gone() -> int:
    """The reader of a pipe has seen enough; without this Python complains once more when it closes stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}."
    return " ".join(str(error).split())


def _complain(sentence: str, code: int) -> int:
    # Of several processes that torchrun started the first speaks as if it were alone.
    rank = os.environ.get("RANK", "0")
    print(f"l2p{'' if rank == '0' else f' (process {rank})'}: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
