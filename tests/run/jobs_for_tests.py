"""Work functions that workers import by name."""

import ctypes
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

from nervure._kit import Diverged
from nervure.spec import Measurement


def work(job, progress, notes):
    """Do what the job's parameters say, and leave a line in a file for every time a job begins and ends."""
    params = job.params
    log(params, f"begin {job.seed} {os.getpid()}")
    notes.measurements.append(Measurement(arm="a", metric="m", value=float(job.seed)))
    match params.get("do"):
        case "raise":
            raise ValueError("this job is broken")
        case "diverge":
            raise Diverged(3, float("nan"))
        case "segfault":
            ctypes.string_at(0)
        case "exit":
            os._exit(7)
        case "kill":
            os.kill(os.getpid(), 9)
        case "kill once":
            marker = Path(params["marker"])
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), 9)
        case "meet":
            # Go on when as many jobs are here at the same time.
            end = time.monotonic() + 30
            while Path(params["log"]).read_text().count("begin") < params["guests"]:
                if time.monotonic() > end:
                    raise TimeoutError
                time.sleep(0.02)
        case "orphan":
            # A forked child holds the worker's pipes open when the worker dies.
            if os.fork() == 0:
                time.sleep(60)
            os._exit(9)
        case "hang":
            time.sleep(600)
        case "warn":
            warnings.warn("mind the gap", RuntimeWarning, stacklevel=1)
            notes.warnings.append("a sentence")
            print("printed, which must not reach the protocol")
        case "child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            log(params, f"child {child.pid}")
        case "chatter":
            for i in range(20_000):
                progress(i / 20_000, "x" * 100)
        case "remember":
            notes.cost["calls"] = float(len(CALLS))
            CALLS.append(job.seed)
        case "environment":
            import torch

            notes.cost["threads"] = float(torch.get_num_threads())
            notes.warnings.append(os.getcwd())
    end = time.monotonic() + params.get("seconds", 0)
    while time.monotonic() < end:
        progress(1 - (end - time.monotonic()) / params["seconds"], "working")
        time.sleep(0.02)
    log(params, f"end {job.seed} {os.getpid()}")


CALLS = []


def log(params, line):
    if "log" in params:
        # One write of one line with O_APPEND: several processes share the file.
        with Path(params["log"]).open("a") as file:
            file.write(line + "\n")


class Walker:
    """A trainable whose score tells where its weights came from, step by step."""

    def __init__(self, member, seconds=0.0):
        self.path, self.member, self.seconds = [float(member)], member, seconds

    def step(self, config):
        time.sleep(self.seconds)
        if config["rate"] < 0:
            raise ValueError("this member is broken")
        self.path = [*self.path, config["rate"]]

    def eval(self):
        return sum(rate * (n + 1) for n, rate in enumerate(self.path)) % 1.7

    def state_dict(self):
        return {"path": self.path}

    def load_state_dict(self, state):
        self.path = list(state["path"])


def walker(member):
    return Walker(member)


def slow_walker(member):
    return Walker(member, seconds=0.15)


def dying_walker(member):
    if member == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return Walker(member)
