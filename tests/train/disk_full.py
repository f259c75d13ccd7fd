"""A child that trains on a disk that is full from its n-th write on, then has room again, for every n it is given.

Usage: disk_full.py CASE.json. The case: {"out": folder, "shards": [...], "at": [n, ...], "settings": {...}}. Prints one
JSON line a number: what the run said, and the losses and the digest of the weights once there was room again.

Every write goes through libc, so a layer in front of it (LD_PRELOAD) fails them as a full disk does: Python's, torch's,
safetensors' and the C++ library's alike. Compiled here, where gcc is; without it the caller skips.
"""

import ctypes
import hashlib
import json
import shutil
import sys
from pathlib import Path

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long writes = 0, full_from = -1;

void disk_full_from(const char *where, long n) { strncpy(folder, where, PATH_MAX - 1); writes = 0; full_from = n; }
long disk_writes(void) { return writes; }

static int refuses(int fd) {
    char link[64], path[PATH_MAX];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    if (strncmp(path, folder, strlen(folder))) return 0;
    writes++;
    if (full_from < 0 || writes < full_from) return 0;
    errno = ENOSPC;
    return 1;
}
#define REAL(name, type, ...) static type (*real)(__VA_ARGS__) = 0; if (!real) real = dlsym(RTLD_NEXT, name)
ssize_t write(int fd, const void *b, size_t n) {
    REAL("write", ssize_t, int, const void *, size_t); return refuses(fd) ? -1 : real(fd, b, n); }
ssize_t writev(int fd, const struct iovec *v, int n) {
    REAL("writev", ssize_t, int, const struct iovec *, int); return refuses(fd) ? -1 : real(fd, v, n); }
ssize_t pwrite64(int fd, const void *b, size_t n, off_t o) {
    REAL("pwrite64", ssize_t, int, const void *, size_t, off_t); return refuses(fd) ? -1 : real(fd, b, n, o); }
int fsync(int fd) { REAL("fsync", int, int); return refuses(fd) ? -1 : real(fd); }
"""


def digest(run):
    import safetensors.torch

    from cogtrain.model import lora

    state = safetensors.torch.load_file(run / lora.FILE)
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def main(case):
    import torch
    from accelerate.state import AcceleratorState

    from cogcommon.errors import DiskError
    from cogcommon.model.device import pick_device, quiet_libraries
    from cogtrain.distributed.signals import StopRequest
    from cogtrain.runs.checkpoint import list_checkpoints
    from cogtrain.runs.run import open_run
    from cogtrain.settings import LoraSettings
    from cogtrain.trainer.loop import train

    pick_device()
    quiet_libraries()
    libc = ctypes.CDLL(None)
    out = Path(case["out"])

    def run():
        AcceleratorState._reset_state(reset_partial_state=True)
        settings = LoraSettings(**{"shards": case["shards"], "out": out / "run"} | case["settings"])
        return train(open_run(settings, torch.device("cpu"), 1), StopRequest())

    for number in case["at"]:
        shutil.rmtree(out / "run", ignore_errors=True)
        said = ""
        libc.disk_full_from(str(out).encode(), ctypes.c_long(number))
        try:
            run()
        except DiskError as error:
            said = str(error)
        writes = libc.disk_writes()
        left = [path.name for path in (out / "run").glob(".*.tmp")] if (out / "run").exists() else []
        kept = [path.name for path in list_checkpoints(out / "run")]
        libc.disk_full_from(b"", ctypes.c_long(-1))
        folder = run()
        print(
            json.dumps({
                "at": number, "said": said, "writes": writes, "left": left, "kept": kept, "losses": losses(folder),
                "weights": digest(folder), "report": (folder / "report.html").is_file(),
            }),
            flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
