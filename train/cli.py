"""The command line of cogtrain. Heavy imports happen inside the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from cogcommon.cli import interrupt
from cogcommon.cli.command import add_command, make_app, run_app
from cogcommon.cli.leaving import run_and_leave
from cogcommon.cli.progress import paused
from cogcommon.cli.streams import result_alone
from cogcommon.errors import CogError
from cogcommon.jobs.settings import LaunchSettings

from .settings.planning import DoctorSettings, ForecastSettings
from .settings.results import CompareSettings, ExportSettings, GenerateSettings, WatchSettings
from .settings.training import LoraSettings, SftSettings, TrainSettings

app = make_app("cogtrain", "Fine-tune CogVideoX on the shards that cogprep encode wrote.")


def train(settings: TrainSettings) -> None:
    """Start a run; in several processes where there are several GPUs."""
    from .distributed.launch import Hosts, join_environment, relaunch, wanted_processes
    from .distributed.signals import ending_at_once

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with ending_at_once():
        from cogcommon.files.memory import give_back_what_is_freed
        from cogcommon.model.device import pick_device

        from .distributed import elastic
        from .distributed.leaving import REFUSED, PeerFailed, PeerLost
        from .memory.ready import check_ready
        from .runs.opening import open_run

        give_back_what_is_freed()
        try:
            if not join_environment():
                processes, hosts = wanted_processes(settings), Hosts.of(os.environ)
                if (world := processes * hosts.count) > 1:
                    with result_alone(settings.json):
                        check_ready(open_run(settings, pick_device(), world), processes)  # refuse it before they start
                    with paused():  # rank 0 says what goes on, and the result
                        code = relaunch(processes, hosts)
                    sys.exit(code)
            with result_alone(settings.json) as tell:
                _train_here(settings, tell)
        except PeerFailed as failed:  # the one that has failed says why
            if failed.code == REFUSED:
                elastic.not_again()
            sys.exit(failed.code)
        except PeerLost as lost:
            from cogcommon.cli.terminal import show_error

            show_error(lost)
            sys.exit(lost.code)


def _train_here(settings: TrainSettings, tell: Callable[[str], None]) -> None:
    """One process of a run.

    Args:
        tell: takes what came of it, of process 0.
    """
    from cogcommon.libraries import hash_triton_ahead, quiet_libraries
    from cogcommon.model.device import pick_device, start_gpu

    from .distributed import elastic
    from .distributed.peers import meet
    from .distributed.signals import Stopped, StopRequest
    from .memory.ready import check_ready
    from .report.outcome import outcome
    from .runs.opening import open_run

    peers = meet()
    try:
        with peers.leaving_together():
            device = pick_device(int(os.environ.get("LOCAL_RANK", "0")))
            start_gpu(device)
            run = peers.together(lambda: open_run(settings, device, peers.world, peers))
            peers.together(lambda: check_ready(run, peers.here, device))
            quiet_libraries()
            if settings.compile != "off":
                hash_triton_ahead(device)
            from .trainer.trainer import train as train_run

            folder = train_run(run, StopRequest(), peers)
        if peers.main and settings.json:
            tell(outcome(folder))
    except Stopped as stopped:
        if stopped.for_good:
            elastic.not_again()
        if peers.main:
            print(f"stopped; to resume: {stopped.command}", flush=True)
        if peers.main and settings.json:
            tell(outcome(stopped.folder, stopped.command))
        sys.exit(stopped.code)


def plan(settings: ForecastSettings) -> None:
    from .commands.plan import run

    run(settings)


def doctor(settings: DoctorSettings) -> None:
    from .commands.doctor import run

    run(settings)


def watch(settings: WatchSettings) -> None:
    from .commands.watch import run

    run(settings)


def launch(settings: LaunchSettings) -> None:
    from .commands.launch import run

    run(settings)


def generate(settings: GenerateSettings) -> None:
    from .commands.generate import run

    run(settings)


def compare(settings: CompareSettings) -> None:
    from .commands.compare import run

    run(settings)


def export(settings: ExportSettings) -> None:
    from .commands.export import run

    run(settings)


_BEFORE, _TRAIN, _AFTER = "Before you train", "Train", "See and use what was trained"  # headings of --help

add_command(
    app, "plan", ForecastSettings, plan,
    "Say what fits on your GPU, how long it takes, and the command to run. Needs no weights, shards or network.",
    (
        "cogtrain plan --model THUDM/CogVideoX-5b --resolution 49x480x720 --gpu 4090",
        "cogtrain plan --shards out/*.tar --gpu 24GB --gpus 2",
    ),
    _BEFORE,
    only_prints=True,
)  # fmt: skip
add_command(
    app, "doctor", DoctorSettings, doctor,
    "Say what of this machine matters, and what to do about it.",
    ("cogtrain doctor",),
    _BEFORE,
    only_prints=True,
)  # fmt: skip
add_command(
    app, "lora", LoraSettings, train,
    "Train a LoRA.",
    (
        "cogtrain lora --shards out/*.tar",
        'cogtrain lora --shards out/*.tar --steps 2000 --out runs/mine --validate-prompt "A red ball rolls."',
        "cogtrain lora --shards out/*.tar --validate-shards out/val/*.tar --keep-best --out runs/mine",
    ),
    _TRAIN,
)  # fmt: skip
add_command(
    app, "sft", SftSettings, train,
    "Train all weights (full fine-tuning).",
    ("cogtrain sft --shards out/*.tar --out runs/mine",),
    _TRAIN,
)  # fmt: skip
add_command(
    app, "launch", LaunchSettings, launch,
    "Write a run as a job for Slurm, Kubernetes or SkyPilot, on one machine or many, and check it before it queues.",
    (
        "cogtrain launch --on slurm --nodes 2 --gpus 8 --time 24h -- lora --shards out/*.tar --out runs/mine",
        "cogtrain launch --on kubernetes --nodes 2 --image registry/cogtune --volume claim:/data -- lora "
        "--shards 'out/*.tar' --out runs/mine",
    ),
    _TRAIN,
)  # fmt: skip
add_command(
    app, "watch", WatchSettings, watch,
    "Show the curves and videos of runs as they train, in a browser on this machine.",
    ("cogtrain watch runs/mine", "cogtrain watch runs/mine runs/other"),
    _AFTER,
)  # fmt: skip
add_command(
    app, "generate", GenerateSettings, generate,
    "Make a video with the tuned model, and one with the base model beside it.",
    ('cogtrain generate --run runs/mine --prompt "A red ball rolls down a hill."',),
    _AFTER,
)  # fmt: skip
add_command(
    app, "compare", CompareSettings, compare,
    "Draw checkpoints of a run beside one another and the base model, with one seed, to choose one.",
    (
        'cogtrain compare runs/mine --checkpoints 200,400,600 --prompt "A red ball rolls down a hill."',
        'cogtrain compare runs/mine --checkpoints best --strengths 0.6,0.8,1 --prompt "A red ball."',
    ),
    _AFTER,
)  # fmt: skip
add_command(
    app, "export", ExportSettings, export,
    "Write the weights of a run for other programs, and check that they load.",
    ("cogtrain export --run runs/mine --to merged",),
    _AFTER,
)  # fmt: skip


def main() -> None:
    """The program, which ends this process."""
    run_and_leave(run)


def run() -> None:
    """The command line; raises SystemExit."""
    from .distributed import elastic

    if not _trains():  # a run saves first, and says how to resume it
        interrupt.catch_interrupts()
    try:
        with interrupt.exit_code():
            run_app(_run)
    finally:
        elastic.at_end()


def _trains() -> bool:
    return sys.argv[1:2] in (["lora"], ["sft"])


def _run() -> None:
    """The command. An error of the settings, found before the processes of a run have met, is said once by all."""
    try:
        app()
    except CogError as error:
        if not _trains():
            raise
        from .distributed import elastic
        from .distributed.launch import join_environment
        from .distributed.leaving import PeerFailed
        from .distributed.peers import have_met, meet

        elastic.not_again()  # it would be refused again
        if have_met() or not join_environment():
            raise
        fault = error  # which the name above forgets

        def fail() -> None:
            raise fault

        try:
            peers = meet()
        except CogError:
            raise error from None
        try:
            peers.together(fail)
        except PeerFailed as failed:
            sys.exit(failed.code)
