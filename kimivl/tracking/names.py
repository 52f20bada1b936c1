"""Every metric that a run logs: its unit and meaning, in one table for W&B, the documentation and the tests."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

STEP, TOKENS, ITERATION = "trainer/global_step", "data/tokens_seen", "rollout/iteration"
AXES = (STEP, TOKENS, ITERATION)
"""What a chart's x-axis may be: optimiser steps, tokens trained on, RL iterations."""
CARRIED = (TOKENS, ITERATION)
"""Axes that some rows of a run have, and W&B gets in each."""

BY_ITERATION = ("rollout", "reward", "sampler")
"""Namespaces that have one value for each RL iteration."""


def axis(name: str) -> str:
    """What the curve of a metric, or of a pattern of metrics, is drawn over to begin with."""
    return ITERATION if name.partition("/")[0] in BY_ITERATION else STEP


def pattern(name: str) -> str:
    """All metrics of the namespace of one; itself where it has none."""
    room, slash, _ = name.partition("/")
    return f"{room}/*" if slash else name


class Metric(NamedTuple):
    """``best``: which of its values stands in a run's summary beside the last."""

    unit: str
    meaning: str
    best: Literal["min", "max", ""] = ""


METRICS: dict[str, Metric] = {
    STEP: Metric("steps", "number of the optimiser step, from 0; val/ has that of the last, test/ the steps done"),
    "epoch": Metric("epochs", "number of the epoch, from 0, in RL the iteration; test/ has the epochs done"),
    # train/
    "train/loss": Metric("nats per target token; RL: the objective's own", "loss of the step, without aux_loss", "min"),
    "train/aux_loss": Metric("1", "weighted balancing loss of the experts"),
    "train/grad_norm": Metric("1", "global norm of the gradient before clipping"),
    "train/grad_norm/*": Metric("1", "the same in one part of the model"),
    "train/nonfinite_steps": Metric("steps", "steps whose loss or gradient was not finite; they are left out"),
    "lr-*": Metric("1", "learning rate of a parameter group"),
    # val/ and test/: each held-out problem answered greedily, and several times at temperature 1
    "val/accuracy": Metric("share of problems", "greedy answers that verify, validation", "max"),
    "test/accuracy": Metric("share of problems", "greedy answers that verify, test", "max"),
    "*/sampled_accuracy": Metric("share of responses", "sampled answers that verify"),
    "*/accuracy_difficulty_*": Metric("share of problems", "greedy accuracy at one difficulty"),
    "*/length": Metric("tokens", "mean length of greedy responses"),
    "*/sampled_length": Metric("tokens", "mean length of sampled responses"),
    "*/finished": Metric("share of problems", "greedy responses that ended before the cap"),
    "*/problems": Metric("problems", "problems evaluated"),
    "*/verifier_failures": Metric("responses", "responses that the verifier failed on; they count as wrong"),
    "*/thinking_closed": Metric("share of problems", "responses whose thinking is closed"),
    "*/think_tokens": Metric("tokens", "mean length of the thinking"),
    "*/answer_tokens": Metric("tokens", "mean length of what follows the thinking"),
    "*/planning": Metric("share of problems", "thinking that plans"),
    "*/evaluation": Metric("share of problems", "thinking that evaluates intermediate steps"),
    "*/reflection": Metric("share of problems", "thinking that takes a step back"),
    "*/exploration": Metric("share of problems", "thinking that tries another way"),
    "*/transcripts": Metric("table", "examples of the evaluation"),
    # data/
    TOKENS: Metric("tokens", "tokens trained on since the run's first step, all ranks"),
    "data/packing_efficiency": Metric("share", "tokens of what the packs could hold"),
    "data/dropped/*": Metric("samples", "samples left out so far, by reason"),
    "data/retention": Metric("share of chains", "chains of thought that are trained on"),
    "data/left_out/*": Metric("share of chains", "chains that are not, by reason"),
    "data/rejected": Metric("table", "samples that cannot be used, with reason and detail"),
    # perf/
    "perf/tokens_per_s": Metric("tokens/s", "tokens trained on, all ranks", "max"),
    "perf/image_tokens_per_s": Metric("tokens/s", "image tokens, all ranks"),
    "perf/samples_per_s": Metric("samples/s", "samples, all ranks"),
    "perf/step_s": Metric("s", "an optimiser step"),
    "perf/data_wait": Metric("share of time", "the training loop stood still for its data; the rank that waited most"),
    "perf/tflops": Metric("TFLOP/s", "model operations of one device"),
    "perf/mfu": Metric("share", "of the device's peak"),
    "perf/memory_gb": Metric("10^9 bytes", "most memory of a rank"),
    "perf/memory_reserved_gb": Metric("10^9 bytes", "most that the CUDA allocator of a rank held"),
    "perf/memory_retries": Metric("times", "the CUDA allocator had to free its cache to go on"),
    "perf/checkpoint_s": Metric("s", "training stood still for a checkpoint"),
    "perf/rollout_tokens_per_s": Metric("tokens/s", "new tokens of the rollout engine"),
    "perf/rollout_tokens": Metric("tokens", "new tokens of an iteration"),
    "perf/rollout_steps": Metric("steps", "decoding steps of an iteration"),
    "perf/rollout_rows": Metric("rows", "mean responses that are decoded at once"),
    "perf/rollout_balance": Metric("share", "mean time that the ranks' rollouts take by that of the slowest"),
    "perf/rollout_slot_use": Metric("share", "rows in use of those that there are"),
    "perf/prefill_tokens": Metric("tokens", "prompt tokens read by the rollout engine"),
    "perf/prompts_read": Metric("prompts", "prompts read in training; responses in a pack share one"),
    "perf/packs_per_step": Metric("packs", "packs of an optimiser step of RL"),
    "perf/generate_s": Metric("s", "rollouts of an iteration"),
    "perf/score_s": Metric("s", "judging of an iteration's responses"),
    "perf/reference_s": Metric("s", "reference log-probabilities of an iteration"),
    "perf/sync_s": Metric("s", "weights to the rollout engine"),
    "perf/train_s": Metric("s", "training steps of an iteration"),
    "perf/waited_s": Metric("s", "waited for rollouts that run ahead"),
    "perf/*": Metric("as named", "further figures of a rollout engine"),
    # rollout/, reward/, sampler/: one iteration's
    ITERATION: Metric("iterations", "number of the RL iteration, from 0"),
    "rollout/accuracy": Metric("share of responses", "drawn responses that are right", "max"),
    "rollout/length": Metric("tokens", "mean length of drawn responses"),
    "rollout/length_max": Metric("tokens", "the longest drawn response"),
    "rollout/finished": Metric("share of responses", "responses that ended by themselves"),
    "rollout/mixed_groups": Metric("share of groups", "problems with right and wrong responses: those that teach"),
    "rollout/groups": Metric("groups", "problems whose responses were scored"),
    "rollout/trained_groups": Metric("groups", "problems that the iteration trains on"),
    "rollout/waiting": Metric("responses", "responses that go on in the next iteration"),
    "rollout/off_policy": Metric("share of tokens", "tokens that an earlier policy wrote"),
    "rollout/age": Metric("iterations", "mean age of the policy that wrote a token"),
    "rollout/stop_*": Metric("share of responses", "responses that stopped for this reason"),
    "reward/total": Metric("reward", "mean reward", "max"),
    "reward/failures/*": Metric("responses", "responses that the verifier failed on, by reason"),
    "reward/*": Metric("reward", "mean of one part of the reward"),
    "sampler/ceiling": Metric("difficulty", "the hardest that the curriculum has opened"),
    "sampler/difficulty": Metric("difficulty", "mean of the problems drawn"),
    "sampler/solve_rate": Metric("histogram", "solve rates of the problems visited"),
    "sampler/solve_rate_mean": Metric("share of responses", "mean solve rate of the open problems"),
    "sampler/seen": Metric("share of problems", "open problems that were visited"),
    "sampler/never_solved": Metric("problems", "open problems that were never solved"),
    "sampler/retired": Metric("problems", "open problems that are solved too well to be drawn"),
    "sampler/rounds": Metric("rounds", "draws of the iteration"),
    "sampler/rejected/*": Metric("groups", "groups that the gates rejected, by reason"),
    "sampler/hardest": Metric("table", "the hardest problems so far"),
    # policy/: over the tokens of a step, or of an iteration
    "policy/kl": Metric("nats per token", "k3 estimate of the divergence from the iteration's first policy"),
    "policy/ratio_max": Metric("1", "largest probability ratio of a token"),
    "policy/nll_per_token": Metric("nats per token", "negative log-likelihood of the drawn tokens: their entropy"),
    "policy/log_ratio_squared": Metric("nats^2", "mean squared log-ratio of a response"),
    "policy/nonfinite_tokens": Metric("tokens", "tokens left out because their probability was not finite"),
    "policy/clip_fraction": Metric("share of tokens", "tokens whose ratio is clipped"),
    "policy/tau": Metric("1", "regularisation of mirror descent"),
    "policy/mismatch_*": Metric("nats", "difference of the engine's log-probabilities from the trainer's"),
    "policy/importance_weight": Metric("1", "mean correction of that difference"),
    "policy/off_policy_weight": Metric("1", "mean weight of tokens that an earlier policy wrote"),
    "policy/truncated_tokens": Metric("tokens", "tokens whose correction was cut"),
    "policy/masked_sequences": Metric("responses", "responses left out by the correction"),
    "policy/impossible_tokens": Metric("tokens", "tokens to which one of the two gives no probability"),
    # experts/: the worst over the layers, and each layer
    "experts/max_over_mean*": Metric("1", "load of the busiest expert by the mean load"),
    "experts/entropy*": Metric("share", "entropy of the load by that of an even load"),
    "experts/dead*": Metric("experts", "experts that no token went to"),
}


def describe(name: str) -> Metric | None:
    """What is known of a metric; of several patterns that fit, the most exact."""
    fitting = [pattern for pattern in METRICS if fnmatchcase(name, pattern)]
    return METRICS[max(fitting, key=lambda pattern: len(pattern.replace("*", "")))] if fitting else None


def unknown(logged: Iterable[str]) -> list[str]:
    """Those of the logged metrics that are not in the table."""
    return sorted({name for name in logged if describe(name) is None})
