"""How the model is moved: Muon with AdamW, and the learning-rate schedule of the phases."""

from kimivl.optim.in_backward import MuonAdamWInBackward
from kimivl.optim.muon import MuonAdamW
from kimivl.optim.schedule import PhaseSchedule
from kimivl.optim.states import reset_state

__all__ = ["MuonAdamW", "MuonAdamWInBackward", "PhaseSchedule", "reset_state"]
