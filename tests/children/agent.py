"""`torchrun --nnodes=1:2 --max-restarts=N --rdzv-backend=c10d`, whose processes are forked, not started.

No time decides who is there: two hosts wait for one another as long as no file ``one-host`` lies in the working folder,
and one is lost when its agent has ended.

Usage: agent.py N ENDPOINT cogtrain lora ...
"""

import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
from forked import _start
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import dynamic_rendezvous as meeting
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ONE_HOST = Path("one-host").absolute()


class Settings(meeting.RendezvousSettings):
    min_nodes = property(lambda self: 1 if ONE_HOST.exists() else 2, lambda self, least: None)


class StateHolder(meeting._BackendRendezvousStateHolder):
    def _sanitize(self):
        now = datetime.now(UTC)
        for node in self._state.last_heartbeats:
            lives = psutil.pid_exists(node.pid)
            self._state.last_heartbeats[node] = now if lives else now - timedelta(days=1)
        super()._sanitize()


meeting.RendezvousSettings, meeting._BackendRendezvousStateHolder = Settings, StateHolder
restarts, endpoint, *words = sys.argv[1:]
os.environ |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
config = LaunchConfig(
    run_id="elastic",
    min_nodes=1,
    max_nodes=2,
    nproc_per_node=1,
    rdzv_backend="c10d",
    rdzv_endpoint=endpoint,
    rdzv_configs={"last_call_timeout": 1},  # that one who is alone waits for others
    local_addr="127.0.0.1",
    max_restarts=int(restarts),
    monitor_interval=0.1,
    start_method="fork",
)
try:
    elastic_launch(config, _start)(words)
except ChildFailedError as error:
    sys.exit(f"agent: no restarts are left, and the last exit code is {error.get_first_failure()[1].exitcode}")
except SignalException:
    sys.exit("agent: ended by a signal")
