"""A process that has imported what a run imports, and done nothing else: its forks start in a second."""

import multiprocessing

STAGES = [f"kimivl.stages.{stage}" for stage in ("sft", "long_cot", "rl")]

SERVER = multiprocessing.get_context("forkserver")
# There is one server in a process of tests, and the last list counts.
SERVER.set_forkserver_preload(["kimivl.run", *STAGES, "sklearn.datasets"])
