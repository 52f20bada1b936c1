"""Changes of a config that make it fit, the cheapest first, each tried in the estimate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kimivl.memory.estimate import Estimate, PackEstimate, estimate
from kimivl.memory.setup import PATCHES_PER_TOKEN, Numbers, Pack, Setup

SHORTEST = 1024
"""Tokens below which no pack is proposed."""


@dataclass(frozen=True, slots=True)
class Change:
    """An override as a user types it, and what it does to the setup."""

    override: str
    apply: Callable[[Setup], Setup]


def remedies(found: Estimate, capacity: float) -> tuple[Change, ...] | None:
    """The first changes that fit together, none of which can be left out; None where nothing fits.

    Slower but exact ones come first (the model cut up over the devices, recomputation), then numbers of fewer bits, the
    step in the backward pass, shorter packs, and last what trains less (LoRA).
    """
    chosen: list[Change] = []
    current = found
    while current.peak > capacity:
        change = next(_changes(current, capacity), None)
        if change is None:
            return None
        after = estimate(change.apply(current.setup), current)
        key = change.override.split("=")[0]
        chosen = [earlier for earlier in chosen if earlier.override.split("=")[0] != key] + [change]
        current = after
    for change in list(chosen):
        without = [other for other in chosen if other is not change]
        if estimate(_applied(found.setup, without), current).peak <= capacity:
            chosen = without
    return tuple(chosen)


def _applied(setup: Setup, changes: list[Change]) -> Setup:
    for change in changes:
        setup = change.apply(setup)
    return setup


def _changes(current: Estimate, capacity: float) -> Iterator[Change]:
    setup = current.setup
    if setup.devices > 1 and not setup.sharded and current.parameters.certain > 0.5 * capacity:
        yield Change("strategy=fsdp", lambda one: replace(one, sharded=True))
    if setup.checkpointing != "full":
        mode = "selective" if setup.checkpointing == "none" else "full"
        yield Change(f"activation_checkpointing={mode}", lambda one: replace(one, checkpointing=mode))
    if setup.numbers.parameter == 4 and not setup.on_cpu:
        yield Change("trainer.precision=bf16-true", lambda one: replace(one, numbers=Numbers(2, 2)))
    if setup.rollouts is not None and current.packs[0].peak.name == "rollouts" and setup.rollouts.rows > 1:
        yield _fewer_rows(setup.rollouts.rows // 2)
    if setup.max_accumulate > setup.accumulate and setup.rollouts is not None:
        yield _smaller_experience(min(2 * setup.accumulate, setup.max_accumulate))
    too_large = [pack for pack in current.packs if pack.peak.total > capacity]
    for pack in too_large:
        if setup.rollouts is None and not setup.patches_given and pack.pack.patches > pack.pack.tokens // 4:
            yield _fewer_patches(pack)
    alone = setup.devices == 1 and setup.accumulate == 1 and setup.rollouts is None
    if alone and setup.lora is None and not current.parameters.in_backward:
        override = "optimizer=muon_in_backward trainer.gradient_clip_val=null"
        yield Change(override, _in_backward)
    if setup.lora is None and current.parameters.certain > 0.8 * capacity:
        yield _adapters()
    for pack in too_large:
        if setup.rollouts is None and pack.pack.tokens >= 2 * SHORTEST:
            yield _shorter(pack)
    if setup.lora is None:
        yield _adapters()


def _in_backward(setup: Setup) -> Setup:
    kept = {key: value for key, value in setup.optimizer.items() if key not in ("_target_", "fused", "foreach")}
    if not setup.optimizer["_target_"].startswith("kimivl.optim"):
        kept = {"lr": kept.get("lr", 1e-5)}
    return replace(setup, optimizer=kept | {"_target_": "kimivl.optim.MuonAdamWInBackward"})


def _adapters() -> Change:
    settings = {"rank": 16, "alpha": 32, "targets": ["attention"]}
    return Change("lora=attention", lambda one: replace(one, lora=settings))


def _fewer_rows(rows: int) -> Change:
    def apply(setup: Setup) -> Setup:
        assert setup.rollouts is not None
        return replace(setup, rollouts=replace(setup.rollouts, rows=rows))

    return Change(f"rollout.max_rows={rows}", apply)


def _smaller_experience(accumulate: int) -> Change:
    def apply(setup: Setup) -> Setup:
        share = setup.accumulate / accumulate
        [pack] = setup.packs
        smaller = replace(
            pack,
            label=f"{accumulate} packs a step",
            tokens=max(setup.rollouts.tokens if setup.rollouts else 1, round(pack.tokens * share)),
            patches=pack.patches if setup.patches_given else round(pack.patches * share),
        )
        return replace(setup, packs=(smaller,), accumulate=accumulate)

    return Change(f"trainer.accumulate_grad_batches={accumulate}", apply)


def _fewer_patches(found: PackEstimate) -> Change:
    phase, patches = found.pack.phase, max(found.pack.tokens // 4, found.pack.patches // 2)
    return Change(f"++data.phases.{phase}.max_patches={patches}", _in_phase(phase, lambda one: (one.tokens, patches)))


def _shorter(found: PackEstimate) -> Change:
    phase, tokens = found.pack.phase, found.pack.tokens // 2
    return Change(
        f"data.phases.{phase}.max_length={tokens}",
        _in_phase(phase, lambda one: (tokens, min(one.patches, PATCHES_PER_TOKEN * tokens))),
    )


def _in_phase(phase: int, limits: Callable[[Pack], tuple[int, int]]) -> Callable[[Setup], Setup]:
    """Other limits, of tokens and patches, for the packs of a phase; the other phases keep theirs."""

    def change(pack: Pack) -> Pack:
        tokens, patches = limits(pack)
        return replace(pack, tokens=tokens, patches=patches) if pack.phase == phase else pack

    return lambda setup: replace(setup, packs=tuple(map(change, setup.packs)))
