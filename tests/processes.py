"""Training in processes of their own, that can be killed.

A stage imports for several seconds. Here a fork server imports once, and every process of every
test is forked from it: `start` is what a launcher does, at a tenth of the time.
"""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time

STEPS = 15
PRETRAIN = {
    "config_overrides": '{"n_layer": 2, "n_embd": 32, "n_head": 2, "resid_pdrop": 0.1}',
    "max_steps": STEPS, "save_steps": 3, "logging_steps": 1, "learning_rate": 1e-2,
    "per_device_train_batch_size": 8, "eval_documents": 4, "optimizer": "adamw",
    "warmup_steps": 3, "lr_scheduler_type": "cosine",
}  # fmt: skip


def run_module(module, argv, log, environment):
    """What a forked process does: `python -m module *argv`, its output in a file."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__")


def free_port():
    """A port of loopback that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Processes:
    """The ranks of one run."""

    def __init__(self, module, settings, ranks=1):
        self.directory = settings["output_dir"]
        self.log = self.directory.parent / f"{self.directory.name}.log"
        argv = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
        context = multiprocessing.get_context("forkserver")
        trainers = ["pretrain.train", "sft.train", "sft.train_classifier", "rlhf.train_dpo"]
        context.set_forkserver_preload([*trainers, "deepspeed"])
        shared = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        launched = ranks > 1 or "deepspeed" in settings
        if launched:
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.ranks = []
        for rank in range(ranks):
            own = {name: str(rank) for name in ("RANK", "LOCAL_RANK")} if launched else {}
            own |= {name: str(ranks) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")} if own else {}
            words = (module, argv, str(self.log), shared | own)
            self.ranks.append(context.Process(target=run_module, args=words))
        for process in self.ranks:
            process.start()

    def alive(self):
        """Whether one of the ranks still runs."""
        return any(process.is_alive() for process in self.ranks)

    def kill(self, when):
        """SIGKILL every rank once `when()` is true; whether they were still running."""
        while not when():
            if not self.alive():
                return False
            time.sleep(0.002)
        was_alive = self.alive()
        for process in self.ranks:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        for process in self.ranks:
            process.join()
        return was_alive

    def finish(self):
        """Wait for the end; the run's record."""
        for process in self.ranks:
            process.join(300)
        assert [process.exitcode for process in self.ranks] == [0] * len(self.ranks), self.output()
        return json.loads((self.directory / "run.json").read_text(encoding="utf-8"))

    def output(self):
        """What the processes have printed."""
        return self.log.read_text(encoding="utf-8")[-6000:]
