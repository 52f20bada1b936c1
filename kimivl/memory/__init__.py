"""Where the memory of a run goes on one device, worked out from its config: no GPU, no data, no weights needed.

``setup`` reads the config, ``parameters`` builds model and optimiser on the meta device, ``activations`` has the
formulas of what a block keeps, ``sharding`` those of FSDP2, ``estimate`` adds up, ``remedies`` looks for changes that
fit, ``report`` prints.
"""

from kimivl.memory.devices import Device
from kimivl.memory.estimate import Estimate, estimate
from kimivl.memory.setup import Setup

__all__ = ["Device", "Estimate", "Setup", "estimate"]
