"""The command `l2p`: parses arguments and dispatches. Each command's work is in its own module, imported when it runs,
so that `l2p --help` answers quickly, without torch."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..l2p_core.dataset.problems import TooManyProblems
from ..l2p_core.files.paths import typed
from ..l2p_core.ranges import SEED
from ..l2p_core.version import __version__
from . import evaluate_commands, file_commands, image_commands, prompt_commands, run_commands
from .arguments import Commands as _Commands
from .arguments import Number, add_json, check_json
from .arguments import command as _command
from .arguments import positive as _positive
from .arguments import positive_number as _positive_number
from .interrupt import terminable
from .streams import patient_streams

EXIT_MISTAKE = 2
EXIT_FAILURE = 1
EXIT_INTERRUPT = 130  # what shells report for SIGINT; also after a signal that ends a process
_TRANSFER = ("full", "starts", "policies", "data", "shift")
"""The groups of `benchmark.transfer_arms`, which would import torch."""
_WORLDS = ("shapes", "scenes")
"""The keys of `tiny.worlds.WORLDS`, likewise."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_MISTAKE, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        """Complain about unknown arguments here: argparse leaves those of a command to the parser of all commands."""
        namespace, unknown = super().parse_known_args(*args, **options)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a user's mistake, 1 for a failed run, 130 if stopped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # To a file or pipe, Windows writes its old code page, which lacks most characters that a path may have.
        sys.stdout.reconfigure(errors="backslashreplace")
    with patient_streams() as output:
        try:
            with terminable():
                code = _run(build_parser().parse_args(argv))
        except KeyboardInterrupt:
            return _complain("stopped.", EXIT_INTERRUPT)
        output.flush()
        if output.lost and not code:
            return _complain(f"the output could not be written: {output.lost.strerror}.", EXIT_MISTAKE)
        return code


def _run(args: argparse.Namespace) -> int:
    try:
        args.command(args)
        return 0
    except ModuleNotFoundError as error:
        if args.debug or error.name not in ("torch", "matplotlib"):
            raise
        return _complain(
            f"this command needs {error.name}: install this package with its extra 'standalone'.", EXIT_FAILURE
        )
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        return _complain(_message(error), EXIT_MISTAKE)
    except RuntimeError as error:
        # Torch reports full memory, and the trainer a diverged run, in this way; other errors are bugs of ours.
        if args.debug or not _is_failure_of_the_run(error):
            raise
        return _complain(_message(error), EXIT_FAILURE)


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
        file_commands.add_quantise,
        prompt_commands.add_prompts,
        image_commands.add_synth,
        run_commands.add_cache,
        run_commands.add_plan,
        run_commands.add_train,
        file_commands.add_merge,
        file_commands.add_delta,
        image_commands.add_sample,
        evaluate_commands.add_evaluate,
        _add_benchmark,
        _add_doctor,
    ):
        add(commands)
    return parser


def _add_demo(commands: _Commands) -> None:
    parser = _command(
        commands, "demo", "convert, train, sample and score the bundled tiny model, live, and draw a figure"
    )
    parser.add_argument("--output", type=typed, default=Path("demo"), help="folder for the figure and all other files")
    parser.add_argument("--steps", type=_positive, default=None, help="training steps (default: the recipe's)")
    parser.add_argument("--seed", type=Number(SEED), default=0, help="seed of the initialisation and the training")

    def run(args: argparse.Namespace) -> None:
        from .demo import demo

        demo(args.output, steps=args.steps, seed=args.seed)

    parser.set_defaults(command=run)


def _add_doctor(commands: _Commands) -> None:
    parser = _command(commands, "doctor", "print versions, devices, memory and missing libraries, for bug reports")
    parser.add_argument("--json", action="store_true", help="print JSON")

    def run(args: argparse.Namespace) -> None:
        from .doctor import doctor

        doctor(as_json=args.json)

    parser.set_defaults(command=run)


def _add_benchmark(commands: _Commands) -> None:
    parser = _command(commands, "benchmark", "measure this machine and the method")
    kinds = parser.add_subparsers(title="benchmarks", metavar="KIND", required=True)

    head = _command(kinds, "head", "the Detailer Head: memory format, tiles, and a 10240-pixel image in little memory")
    head.add_argument("--quick", action="store_true", help="small sizes: a check that it runs, not a measurement")
    add_json(head, "results")

    def run_head(args: argparse.Namespace) -> None:
        from .benchmark.head import benchmark_head

        check_json(args)
        benchmark_head(quick=args.quick, json_file=args.json)

    head.set_defaults(command=run_head)

    train = _command(kinds, "train", "time and memory of training compared with the published trainer")
    train.add_argument("--quick", action="store_true", help="small sizes: a check that it runs, not a measurement")
    train.add_argument("--precision", choices=["bf16", "fp32"], default=None, help="default: by processor")
    train.add_argument("--device", default=None, help="torch device, such as cpu or cuda (default: a GPU if any)")
    add_json(train, "results")

    def run_train(args: argparse.Namespace) -> None:
        from .benchmark.train import benchmark_train

        check_json(args)
        benchmark_train(quick=args.quick, precision=args.precision, device=args.device, json_file=args.json)

    train.set_defaults(command=run_train)

    gpu = _command(kinds, "gpu", "the 6B model on this GPU: exactness, speed and memory of sampling and training")
    gpu.add_argument("--output", type=typed, default=Path("runs/gpu"), help="folder for gpu.md and gpu.json")
    gpu.add_argument("--parts", default=None, metavar="NAME,...", help="parts to run (default: all)")
    gpu.add_argument("--list", action="store_true", help="print the parts and their rows, and measure nothing")
    gpu.add_argument("--minutes", type=_positive_number, default=8.0, help="time limit; remaining rows are skipped")
    gpu.add_argument("--model", type=typed, default=None, metavar="FILE", help="an L2P model (default: random weights)")
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

    checkpoint = _command(kinds, "checkpoint", "speed and memory of conversion, delta, merge and quantising")
    checkpoint.add_argument("--gigabytes", type=_positive_number, default=1.0, help="size of the checkpoint to create")
    checkpoint.add_argument("--folder", type=typed, default=None, help="where to create it (default: temporary folder)")

    def run_checkpoint(args: argparse.Namespace) -> None:
        from .benchmark.checkpoint import benchmark_checkpoint

        benchmark_checkpoint(gigabytes=args.gigabytes, folder=args.folder)

    checkpoint.set_defaults(command=run_checkpoint)

    formats = _command(kinds, "formats", "what storing a model in 8 bits costs: errors and scores")
    formats.add_argument("--images", type=_positive, default=96, help="of the bundled model, in each format")

    def run_formats(args: argparse.Namespace) -> None:
        from .benchmark.formats import benchmark_formats

        benchmark_formats(images=args.images)

    formats.set_defaults(command=run_formats)

    depth = _command(kinds, "depth", "whether a model overfitted on a 16-bit ramp of 4,096 levels keeps them apart")
    depth.add_argument(
        "--output", type=typed, default=Path("runs/depth"), help="folder; a run is resumed from its last save"
    )
    depth.add_argument("--steps", type=_positive, default=None, help="training steps (default: 500)")
    depth.add_argument(
        "--quick", action="store_true", help="16 levels, 2 steps: a check that it runs, not a measurement"
    )

    def run_depth(args: argparse.Namespace) -> None:
        from .benchmark.depth import benchmark_depth

        benchmark_depth(args.output, args.steps, args.quick)

    depth.set_defaults(command=run_depth)

    transfer = _command(
        kinds, "transfer", "what transfer keeps of the tiny source, compared over starts, policies, images and noise"
    )
    transfer.add_argument(
        "--output", type=typed, default=Path("runs/transfer"), help="folder; finished stages are kept"
    )
    transfer.add_argument("--steps", type=_positive, default=None, help="steps of the full run (default: the recipe's)")
    transfer.add_argument("--ablation-steps", type=_positive, default=None, help="steps of each compared arm")
    transfer.add_argument("--seeds", type=_positive, default=3, help="seeds of each compared arm")
    transfer.add_argument(
        "--minutes", type=_positive, default=None, help="leave seeds that would take longer for another call"
    )
    transfer.add_argument(
        "--only", nargs="+", choices=_TRANSFER, default=_TRANSFER, help="what to measure (default: all)"
    )
    # Of version 0.1; "data" is measured by default now.
    transfer.add_argument("--renderings", action="store_true", help=argparse.SUPPRESS)
    transfer.add_argument("--world", choices=_WORLDS, default="shapes", help="the tiny world to measure in")
    transfer.add_argument("--write-delta", type=typed, default=None, metavar="FILE", help="also write the delta here")

    def run_transfer(args: argparse.Namespace) -> None:
        from ..l2p_core.tiny.worlds import WORLDS
        from .benchmark.transfer import benchmark_transfer

        benchmark_transfer(
            args.output,
            steps=args.steps,
            compared_steps=args.ablation_steps,
            seeds=args.seeds,
            groups=args.only,
            write_delta=args.write_delta,
            world=WORLDS[args.world],
            minutes=args.minutes,
        )

    transfer.set_defaults(command=run_transfer)
    _add_benchmark_hybrid(kinds)


def _add_benchmark_hybrid(kinds: _Commands) -> None:
    hybrid = _command(kinds, "hybrid", "latents, pixels, hand-over and growth compared on the bundled models")
    hybrid.add_argument("--output", type=typed, default=Path("runs/hybrid"), help="folder; finished rows are kept")
    hybrid.add_argument("--captions", type=_positive, default=96, help="captions of each pass")
    hybrid.add_argument("--seeds", type=_positive, default=3, help="number of passes, each with its own noise")
    hybrid.add_argument("--world", choices=_WORLDS, default="shapes", help="the tiny world to measure in")
    hybrid.add_argument("--pixels", type=typed, metavar="FILE", help="a pixel model of that world's source")
    hybrid.add_argument("--large", type=typed, metavar="FILE", help="a pixel model for larger images, to grow into")

    def run(args: argparse.Namespace) -> None:
        from .benchmark.hybrid import benchmark_hybrid

        benchmark_hybrid(args.output, args.captions, args.seeds, args.world, args.pixels, args.large)

    hybrid.set_defaults(command=run)


def _is_failure_of_the_run(error: RuntimeError) -> bool:
    from ..l2p_core.distributed.ranks import ProcessLost
    from ..l2p_core.run.memory_plan import MemoryRanOut
    from ..l2p_core.training.trainer import TrainingDiverged

    ours = isinstance(error, (TrainingDiverged, ProcessLost, MemoryRanOut))
    return ours or "allocate" in str(error) or "out of memory" in str(error)


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}."
    if isinstance(error, TooManyProblems):
        return str(error)  # a list, which would be unreadable in one line
    return " ".join(str(error).split())


def _complain(sentence: str, code: int) -> int:
    # Of several processes started by torchrun, the first reports without its rank.
    rank = os.environ.get("RANK", "0")
    print(f"l2p{'' if rank == '0' else f' (process {rank})'}: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
