"""One process of a run, of which the last fails by itself while the others do something else.

Usage: RANK=... WORLD_SIZE=... MASTER_ADDR=... MASTER_PORT=... leaving.py raises|killed|meets
"""

import os
import signal
import sys
import time

from cogcommon.command import make_app, run_app
from cogcommon.errors import RunError
from cogtrain.peers import PeerFailed, meet

app = make_app("leaving", "A process of a run.")


@app.command()
def leave(how: str) -> None:
    try:
        peers = meet()
        print(f"rank {peers.rank}, {os.environ['LOCAL_WORLD_SIZE']} here", flush=True)
        with peers.leaving_together():
            if peers.rank < peers.world - 1:
                # Nothing tells the one that sleeps; the other's network library sees a connection end.
                time.sleep(600) if how == "raises" else peers.wait()
            elif how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RunError("its disk is full", where="run", fix="make room")
    except PeerFailed:
        sys.exit(2)


run_app(app)
