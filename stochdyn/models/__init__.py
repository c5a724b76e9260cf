"""Ready models: thin compositions of a process, a decoder, an encoder and a guide, to be copied and edited."""

from stochdyn.models.latent_ode import LatentODE
from stochdyn.models.latent_sde import LatentSDE
from stochdyn.models.observation_jump_ode import ObservationJumpODE

__all__ = ["LatentODE", "LatentSDE", "ObservationJumpODE"]
