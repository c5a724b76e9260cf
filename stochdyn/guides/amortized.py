"""`AmortizedGuide`: any Pyro model in, a guide out."""

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import biject_to

from stochdyn.data import Series
from stochdyn.encoders import AbstractEncoder, align
from stochdyn.errors import GuideError
from stochdyn.guides.linearise import likelihood_message
from stochdyn.guides.messages import AbstractMessageFamily, FilterMessage, masked
from stochdyn.guides.passes import (
    AsGuide,
    Given,
    PathReached,
    Run,
    emit_parameters,
    is_enumerated,
    observed_log_prob,
    prior_mode,
)
from stochdyn.guides.path_site import PathSite, signature_of
from stochdyn.guides.plates import Place
from stochdyn.guides.sites import FullRank, JointNormal, LocalNormal, MeanField, Start, prior_start
from stochdyn.paths import GuidedPath, Message, SDEPath, information_filter

_serial = count()


class AmortizedGuide(nn.Module):
    """A guide for any Pyro model, read off the model itself.

    Path sites are sampled from the model's own path, guided by messages; every other latent from a normal in
    unconstrained space. Plates, masks, scales, grids and known starts agree with the model by construction. It is
    an ordinary guide: use it with any of Pyro's ELBOs, `SVI`, `Predictive`, or `sd.fit`.

    Args:
        model: the model. Held outside the module tree: its parameters are the model's own. Data are observed in it.
        encoder: reads the model's first argument, a `Series`, so that the messages of a series come from its data
            (amortised: series never seen get a posterior too). None: free parameters per series and grid time.
        message: how messages are made; `FilterMessage()` starts at the information filter, `FreeMessage()` at
            nothing. Both see the latents sampled before the path.
        latents: the family of the other latents, `FullRank()` or `MeanField()`.
        hidden: width of the head that turns an encoding into a message.

    Raises:
        GuideError: at the first call, for a discrete latent that is not enumerated, an encoder without a `Series`,
            data of another population than the guide was trained on (without an encoder), or a grid of another length.

    References:
        Archer et al., "Black box variational inference for state space models", 2015, https://arxiv.org/abs/1511.07367;
        Roeder et al., "Efficient amortised Bayesian inference for hierarchical and nonlinear dynamical systems", 2019,
        https://arxiv.org/abs/1905.12090

    Example:
        >>> import pyro, pyro.distributions as dist, stochdyn as sd
        >>> from pyro.infer import Trace_ELBO
        >>> def model(batch):
        ...     theta = pyro.sample("theta", dist.LogNormal(0.0, 0.5))
        ...     grid = sd.TimeGrid(batch.times)
        ...     with batch.plate("series"):
        ...         z = pyro.sample("z", sd.SDEPath(lambda t, z: -theta[..., None, None] * z, torch.tensor([0.3]),
        ...                                         dist.Normal(torch.zeros(1), 1.0).to_event(1), grid.ts))
        ...         seen = dist.Normal(grid.observed(z), 0.1).mask(batch.mask).to_event(2)
        ...         pyro.sample("y", seen, obs=batch.values)
        >>> batch = sd.Series([0.0, 1.0, 2.0], torch.randn(4, 3, 1))
        >>> guide = sd.AmortizedGuide(model)
        >>> loss = Trace_ELBO().differentiable_loss(model, guide, batch)
        >>> sorted(name for name, _ in guide.named_parameters())
        ['joint.log_scale', 'joint.loc', 'joint.lower', 'paths.z.numbers']
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: AbstractEncoder | None = None,
        *,
        message: AbstractMessageFamily = FilterMessage(),  # noqa: B008
        latents: FullRank | MeanField = FullRank(),  # noqa: B008
        hidden: int = 64,
    ) -> None:
        super().__init__()
        self._model = (model,)
        self.encoder = encoder
        self.message, self.latents, self.hidden = message, latents, hidden
        self.paths, self.locals = nn.ModuleDict(), nn.ModuleDict()
        self.joint: JointNormal | None = None
        self._plates: int | None = None
        self._label = f"{type(self).__name__}${next(_serial)}"

    @property
    def model(self) -> Callable[..., Any]:
        """The model that the guide was made for."""
        return self._model[0]

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Run as a guide; returns the sampled latents by name."""
        run = Run(args, kwargs)
        if self._plates is None:
            self._set_up(run)
        self._emit()
        while True:
            try:
                with AsGuide(run, self._posterior, self._sampled):
                    self.model(*args, **kwargs)
                return run.values
            except PathReached as reached:
                run.potentials[reached.name] = self._potential(reached, run)

    def _emit(self) -> None:
        emit_parameters(self, self._label)
        if isinstance(self.model, nn.Module):
            emit_parameters(self.model, f"{self._label}.model")

    # Set-up: one run of the model tells its sites and plates.

    @torch.no_grad()
    def _set_up(self, run: Run) -> None:
        with torch.random.fork_rng(), poutine.block(), poutine.trace() as tracer:
            self.model(*run.args, **run.kwargs)
        nodes = tracer.trace.nodes
        latents = {n: s for n, s in nodes.items() if s["type"] == "sample" and not s["is_observed"]}
        members = {n: s["value"] for n, s in latents.items() if type(s["fn"]).__name__ == "_Subsample"}
        sites = {n: s for n, s in latents.items() if n not in members and not is_enumerated(s)}
        frames = [f for s in nodes.values() if s["type"] == "sample" for f in s["cond_indep_stack"] if f.vectorized]
        self._plates = max((-f.dim for f in frames), default=0)
        starts: dict[str, Start] = {}
        features = 0
        for name, site in sites.items():
            place = Place.of(name, tuple(site["cond_indep_stack"]), members)
            if isinstance(site["fn"], SDEPath):
                self._set_up_path(name, site["fn"], place, features)
                continue
            with torch.random.fork_rng():
                starts[name] = prior_start(name, site["fn"], place)
            features += starts[name].loc.shape[-1]
        self._set_up_latents(starts)

    def _set_up_latents(self, starts: Mapping[str, Start]) -> None:
        joint = {}
        for name, start in starts.items():
            if isinstance(self.latents, FullRank) and not start.table_shape:
                joint[name] = start
            elif _key(name) not in self.locals:
                self.locals[_key(name)] = LocalNormal.begin(start, self.latents)
        if joint:
            if self.joint is None:
                self.joint = JointNormal.begin(joint, self.latents)
            self.joint.arrange({name: start.loc.shape[-1] for name, start in joint.items()})

    def _set_up_path(self, name: str, prior: SDEPath, place: Place, upstream: int) -> None:
        if _key(name) in self.paths:
            return
        with torch.random.fork_rng():
            draws = prior.expand(prior.batch_shape).guided().rsample((50,)).flatten(0, -2)
        unit = torch.nan_to_num(draws.std(0), nan=1.0, posinf=1.0).clamp(1e-3, 1e3)
        features = None if self.encoder is None else self.encoder.hidden + 2 + upstream
        shape = place.table_shape(prior.batch_shape)
        points = prior.event_shape[0]
        self.paths[_key(name)] = PathSite.begin(self.message, shape, points, unit, features, self.hidden)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for group, kind in (("paths", PathSite), ("locals", LocalNormal)):
            modules, states = getattr(self, group), _grouped(state_dict, f"{prefix}{group}.")
            for key, state in states.items():
                modules[key] = kind.of_state(state)
        joint = _grouped({k: v for k, v in state_dict.items() if k.startswith(f"{prefix}joint.")}, prefix)
        if joint:
            self.joint = JointNormal.of_state(joint["joint"])
        self._plates = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    # Posteriors.

    def _posterior(self, name: str, prior: dist.TorchDistribution, place: Place, run: Run) -> dist.TorchDistribution:
        if isinstance(prior, SDEPath):
            return self._guided(name, prior, place, run)
        if self.joint is not None and name in self.joint.slices:
            return self.joint.posterior(name, prior, run.residuals)
        if _key(name) in self.locals:
            return self.locals[_key(name)].posterior(prior, place)
        raise GuideError(
            f"site '{name}' was not there when the guide first ran; its sites were {self._known()}. A model must have "
            "the same latents in every run."
        )

    def _known(self) -> list[str]:
        joint = [] if self.joint is None else list(self.joint.slices)
        return sorted([*self.paths, *self.locals, *joint])

    def _median(self, name: str, prior: dist.TorchDistribution, place: Place) -> Tensor | None:
        if self.joint is not None and name in self.joint.slices:
            return self.joint.median(name, prior)
        if _key(name) in self.locals:
            return self.locals[_key(name)].median(prior, place)
        return None

    def _sampled(self, name: str, q: Any, value: Tensor, place: Place, run: Run) -> None:
        if isinstance(q, GuidedPath):
            if self.training and torch.is_grad_enabled() and isinstance(self.message, FilterMessage):
                site = self.paths[_key(name)]
                if run.features.pop(f"{name} known", None) is not None:
                    site.follow(value, place, self.message.follow)
            return
        if self.joint is not None and name in self.joint.slices:
            run.residuals.add(q, value)
        run.features[name] = q.free(value)

    # Messages.

    def _guided(self, name: str, prior: SDEPath, place: Place, run: Run) -> GuidedPath:
        site = self._path_site(name)
        base = None
        if isinstance(self.message, FilterMessage):
            if name not in run.potentials:
                raise PathReached(name, prior, place)
            potential, around = run.potentials[name]
            base = information_filter(prior, potential, around)
        else:
            around = self._around(site, prior, place, run)
        numbers, valid = self._numbers(site, prior, place, run)
        build = self.message.build
        message = masked(build(numbers, site.unit, around, base), valid)
        score = masked(build(numbers.detach(), site.unit, around, base), valid)
        return prior.guided(message, score_message=score)

    def _path_site(self, name: str) -> PathSite:
        if _key(name) not in self.paths:
            raise GuideError(f"path site '{name}' was not there when the guide first ran; it knew {self._known()}.")
        return self.paths[_key(name)]

    def _potential(self, reached: PathReached, run: Run) -> tuple[Message, Tensor]:
        """The likelihood's message at the running estimate of the path, and that estimate."""
        name, prior, place = reached.name, reached.prior, reached.place
        site = self._path_site(name)
        batch = run.args[0] if run.args else None
        shape = prior.batch_shape[max(len(prior.batch_shape) - (self._plates or 0), 0) :]
        signature = signature_of(batch, shape, site.seen.device)
        around = self._stored(site, prior, place, signature)
        if around is None:
            around = self._refined(name, prior, run, len(shape))
            if self._on_table(site, around, place) and torch.is_grad_enabled() and self.training:
                site.remember(prior.ts, around, place, signature)
        run.features[f"{name} known"] = torch.ones(())
        leading = run.leading(self._plates or 0)
        around = around.expand(*leading, *around.shape)
        return self._likelihood(name, prior, around, run), around

    @staticmethod
    def _on_table(site: PathSite, around: Tensor, place: Place) -> bool:
        rows = place.take(site.seen, 0).shape
        return rows == around.shape[:-2] and around.shape[-2] <= site.grid.shape[-1]

    def _stored(self, site: PathSite, prior: SDEPath, place: Place, signature: Tensor) -> Tensor | None:
        if place.take(site.seen, 0).shape != signature.shape:
            return None
        if not bool(site.known(prior.ts.to(site.grid.device), place, signature).all()):
            return None
        return place.take(site.around, 2)[..., : prior.event_shape[0], :].clone()

    def _likelihood(self, name: str, prior: SDEPath, around: Tensor, run: Run) -> Message:
        def log_likelihood(z: Tensor) -> Tensor:
            given = Given(run, {**run.values, name: z}, self._median)
            return observed_log_prob(self.model, run, given)

        return likelihood_message(log_likelihood, around)

    @torch.no_grad()
    def _refined(self, name: str, prior: SDEPath, run: Run, plates: int) -> Tensor:
        """The smoothed path by iterated linearisation, from the prior's path without noise."""
        around = _without_particles(prior_mode(prior), plates)
        zeros = torch.zeros_like(around).movedim(-2, 0)
        leading = run.leading(self._plates or 0)
        for _ in range(self.message.refine if isinstance(self.message, FilterMessage) else 0):
            expanded = around.expand(*leading, *around.shape)
            message = information_filter(prior, self._likelihood(name, prior, expanded, run), expanded)
            guided = prior.guided(message)
            noise = zeros.reshape(zeros.shape[0], *[1] * len(leading), *zeros.shape[1:])
            path = guided.transport(noise.expand(zeros.shape[0], *guided.batch_shape, zeros.shape[-1]))
            path = _without_particles(path, plates)
            if not torch.isfinite(path).all():
                break
            around = path
        return around

    @torch.no_grad()
    def _around(self, site: PathSite, prior: SDEPath, place: Place, run: Run) -> Tensor:
        """Where free messages are centred at first: the prior's path without noise, as it was at the first call."""
        shape = prior.batch_shape[max(len(prior.batch_shape) - (self._plates or 0), 0) :]
        signature = signature_of(run.args[0] if run.args else None, shape, site.seen.device)
        around = self._stored(site, prior, place, signature)
        if around is None:
            around = _without_particles(prior_mode(prior), len(shape))
            if self._on_table(site, around, place) and self.training:
                site.remember(prior.ts, around, place, signature)
        return around

    def _numbers(self, site: PathSite, prior: SDEPath, place: Place, run: Run) -> tuple[Tensor, Tensor]:
        """The learned numbers (*batch, time, numbers), and where messages exist (*batch, time)."""
        if self.encoder is None:
            return self._table_numbers(site, prior, place, run)
        batch = run.args[0] if run.args else None
        if not isinstance(batch, Series):
            raise GuideError(
                f"path site '{place.name}': the encoder needs a Series as the model's first argument, got "
                f"{type(batch).__name__}. Call model(batch), or use encoder=None."
            )
        encoding, ahead, valid = align(self.encoder(batch), batch, prior.ts)
        dt = torch.nn.functional.pad(prior.ts.diff(dim=-1), (0, 1)).to(encoding.dtype).expand(ahead.shape)
        parts = [encoding, torch.stack([ahead, dt], -1)]
        upstream = [v for k, v in run.features.items() if not k.endswith(" known")]
        lead = torch.broadcast_shapes(*[v.shape[:-1] for v in upstream], encoding.shape[:-2])
        parts = [p.expand(*lead, *p.shape[-2:]) for p in parts]
        parts += [v[..., None, :].expand(*lead, encoding.shape[-2], v.shape[-1]) for v in upstream]
        assert_head = site.head
        if assert_head is None:
            raise GuideError(f"path site '{place.name}': this guide was trained without an encoder.")
        return assert_head(torch.cat(parts, -1)), valid

    def _table_numbers(self, site: PathSite, prior: SDEPath, place: Place, run: Run) -> tuple[Tensor, Tensor]:
        numbers, valid = site.table_numbers(prior.ts, place)
        rows = place.take(site.seen, 0)
        signature = signature_of(run.args[0] if run.args else None, rows.shape, rows.device)
        changed = rows & (place.take(site.signature, 0) != signature)
        if not self.training and bool((changed | ~rows).any()):
            where = (changed | ~rows).nonzero()[0].tolist()
            raise GuideError(
                f"series {where[-1] if where else 0}: a guide without an encoder knows only the series that it was "
                "trained on, and these are other data. Use encoder=sd.GRUEncoder(...), or fit a new guide."
            )
        return numbers, valid


def _without_particles(path: Tensor, plates: int) -> Tensor:
    return path.reshape(-1, *path.shape[path.dim() - plates - 2 :]).mean(0)


def _key(name: str) -> str:
    return name.replace(".", "__")


def _grouped(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    out: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        if key.startswith(prefix):
            name, _, rest = key[len(prefix) :].partition(".")
            out.setdefault(name, {})[rest] = value
    return out


__all__ = ["AmortizedGuide", "biject_to"]
