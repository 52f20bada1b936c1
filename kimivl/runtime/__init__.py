"""What a run is to the machines that it is on: its ranks, signals, faults, lock and log.

``launch`` and ``spawn`` start ranks, and ``ranks`` is what they say to each other; ``beforehand`` looks at a command
before Hydra acts on it. ``signals`` and ``interruption`` answer schedulers. ``watch`` and ``heartbeats`` notice ranks
that have died or hang, and ``faults`` explains what a machine lacks. ``lock`` keeps a second run out of a folder.
"""
