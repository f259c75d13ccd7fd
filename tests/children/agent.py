"""`torchrun --nnodes=1:2 --max-restarts=N --rdzv-backend=c10d`, whose processes are forked, not started.

Usage: agent.py N ENDPOINT cogtrain lora ...
"""

import os
import sys

from forked import _start
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

restarts, endpoint, *words = sys.argv[1:]
os.environ |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
config = LaunchConfig(
    run_id="elastic",
    min_nodes=1,
    max_nodes=2,
    nproc_per_node=1,
    rdzv_backend="c10d",
    rdzv_endpoint=endpoint,
    rdzv_configs={"last_call_timeout": 4, "keep_alive_interval": 1, "keep_alive_max_attempt": 4},
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
