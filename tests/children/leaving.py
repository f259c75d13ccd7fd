"""One process of a run of two, of which one fails by itself while the other does something else.

Usage: RANK=... WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... leaving.py raises|dies VICTIM
"""

import os
import signal
import sys
import time

from cogcommon.cli.command import make_app, run_app
from cogcommon.errors import RunError
from cogtrain.distributed.leaving import PeerFailed
from cogtrain.distributed.peers import meet

app = make_app("leaving", "A process of a run.")


@app.command()
def leave(how: str, victim: int) -> None:
    try:
        peers = meet()
        print(f"rank {peers.rank}, {os.environ['LOCAL_WORLD_SIZE']} here", flush=True)
        with peers.leaving_together():
            if peers.rank != victim:
                # Nothing tells one that sleeps; the network library of one that waits sees a connection end.
                time.sleep(600) if how == "raises" or victim == 0 else peers.barrier()
            elif how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RunError("its disk is full", where="run", fix="make room")
    except PeerFailed:
        sys.exit(2)


run_app(app)
