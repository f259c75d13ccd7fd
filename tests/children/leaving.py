"""One process of a run of two, of which one fails by itself while the other does something else, or both stop.

Usage: RANK=... WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... leaving.py raises|dies|dies-unasked|stops VICTIM
"""

import os
import signal
import sys
import time
from pathlib import Path

import psutil

from cogcommon.cli.command import make_app, run_app
from cogcommon.cli.terminal import show_error
from cogcommon.errors import RunError
from cogtrain.distributed.leaving import LOST, PeerFailed, PeerLost
from cogtrain.distributed.peers import meet
from cogtrain.distributed.signals import Stopped

app = make_app("leaving", "A process of a run.")


@app.command()
def leave(how: str, victim: int) -> None:
    try:
        peers = meet()
        print(f"rank {peers.rank}, {os.environ['LOCAL_WORLD_SIZE']} here", flush=True)
        others = peers.all_gather(os.getpid())
        with peers.leaving_together():
            if how == "stops":
                raise Stopped(143, "", Path())
            if peers.rank != victim:
                # The network library tells only one that waits in it.
                time.sleep(600) if how != "dies" or victim == 0 else peers.barrier()
            elif how != "raises":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RunError("its disk is full", where="run", fix="make room")
    except PeerFailed as failed:
        sys.exit(failed.code)
    except PeerLost as lost:
        show_error(lost)
        sys.exit(LOST)
    except Stopped as stopped:
        if peers.rank == victim:  # has much to close
            there = psutil.wait_procs([psutil.Process(others[1 - victim])], 1)[1]
            print("is waited for" if there else "is left alone")
        sys.exit(stopped.code)


run_app(app)
