"""`AmortizedGuide`: any Pyro model in, a guide out."""

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to

from stochdyn.encoders import AbstractEncoder
from stochdyn.errors import DivergedError, GuideError
from stochdyn.guides.flow import Flow, JointFlow
from stochdyn.guides.jumps import check_family, guided_jumps, unlearned
from stochdyn.guides.local_flow import LocalFlow
from stochdyn.guides.local_site import AmortizedLatents, Latent, pooled_scales
from stochdyn.guides.marginals import Marginals, MarginalSite, in_use
from stochdyn.guides.messages import AbstractPathFamily, FilterMessage, masked
from stochdyn.guides.passes import (
    AsGuide,
    LatentPath,
    PathReached,
    PathsWithoutNoise,
    Run,
    check_masked,
    emit_parameters,
    is_enumerated,
    is_path,
    own_randomness,
    prior_mode,
    prior_runs,
)
from stochdyn.guides.path_site import PathSite
from stochdyn.guides.plates import Place, key_of
from stochdyn.guides.posterior_drift import DriftSite, PosteriorDrift
from stochdyn.guides.sites import FullRank, JointNormal, LocalNormal, MeanField, Start, prior_start
from stochdyn.guides.smoother import Smoother, without_particles
from stochdyn.guides.upstream import seen_by_path, series_of
from stochdyn.paths import (
    Compiled,
    GuidedJumpPath,
    GuidedPath,
    JumpDiffusionPath,
    MarginalPath,
    Message,
    SDEPath,
    information_filter,
)

_serial = count()
_PRIOR_RUNS = 8


class AmortizedGuide(nn.Module):
    """A guide for any Pyro model, read off the model itself.

    Path sites are sampled from the model's own path, guided by messages; every other latent from a normal in
    unconstrained space. Plates, masks, scales, grids and known starts agree with the model by construction. It is
    an ordinary guide: use it with any of Pyro's ELBOs, `SVI`, `Predictive`, or `sd.fit`.

    Args:
        model: the model. Held outside the module tree: its parameters are the model's own. Data are observed in it.
        encoder: reads the model's first argument, a `Series`, so that the messages of a series come from its data
            (amortised: series never seen get a posterior too). None: free parameters per series and grid time.
        paths: how paths are guided: by messages, of which `FilterMessage()` starts at the information filter,
            `FreeMessage()` at nothing. The filter and the encoder's head see the latents sampled before the path.
        amortize: by the name of a latent in a plate that of the plate: over the series, or over groups of them
            (`batch.group_plate`). Its posterior is then the prior times a message from the encoding of the series, or
            the product of the messages of a group's members; with `LocalFlow(plate)` in place of the plate's name it
            is bent by a flow that reads the data too. Other latents in plates have a posterior per member.
        latents: the family of the other latents, `FullRank()`, `MeanField()` or `Flow()`.
        hidden: width of the head that turns an encoding into a message.
        loop: `Compiled()` compiles the loop over time of the guided paths (without a control); None runs it step by
            step.

    Raises:
        GuideError: for `amortize` without an encoder; when called, for a discrete latent that is not enumerated, an
            encoder without a `Series`, data of another population than the guide was trained on (where something is
            not amortised), a grid of another length, or a site or plate of `amortize` that is not there.

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
        ...         z = pyro.sample("z", sd.SDEPath(lambda t, z: -theta[..., None] * z, torch.tensor([0.3]),
        ...                                         dist.Normal(torch.zeros(1), 1.0).to_event(1), grid.ts))
        ...         seen = dist.Normal(grid.observed(z), 0.1).mask(batch.mask).to_event(2)
        ...         pyro.sample("y", seen, obs=batch.values)
        >>> batch = sd.Series([0.0, 1.0, 2.0], torch.randn(4, 3, 1))
        >>> guide = sd.AmortizedGuide(model)
        >>> loss = Trace_ELBO().differentiable_loss(model, guide, batch)
        >>> sorted(name for name, _ in guide.named_parameters())
        ['joint.loc', 'joint.log_scale', 'joint.lower', 'paths.z.numbers']
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: AbstractEncoder | None = None,
        *,
        paths: AbstractPathFamily = FilterMessage(),  # noqa: B008
        amortize: Mapping[str, str | LocalFlow] | None = None,
        latents: FullRank | MeanField | Flow = FullRank(),  # noqa: B008
        hidden: int = 64,
        loop: Compiled | None = None,
    ) -> None:
        super().__init__()
        if amortize and encoder is None:
            raise GuideError(
                f"amortize={dict(amortize)} needs an encoder that reads the data. Pass one, e.g. sd.GRUEncoder(...)."
            )
        self._model = (model,)
        self.encoder = encoder
        self.family, self.latents, self.hidden = paths, latents, hidden
        self.loop = loop
        self.paths, self.locals = nn.ModuleDict(), nn.ModuleDict()
        self.amortized = AmortizedLatents(amortize or {})
        self.joint: JointNormal | JointFlow | None = None
        self._plates: int | None = None
        self._label = f"{type(self).__name__}${next(_serial)}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
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
        if self.joint is not None:
            run.residuals = self.joint.history()
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

    @torch.no_grad()
    def prior_draws(self, count: int, *args: Any, **kwargs: Any) -> Iterator[Tensor]:
        """Draws of the prior of the latents outside plates that have a joint posterior, in unconstrained space.

        Args:
            count: how often the model is run; runs that diverge give none.
            *args: of the model.
            **kwargs: of the model.
        """
        for _ in range(count):
            try:
                with poutine.block(), poutine.trace() as tracer, PathsWithoutNoise():
                    self.model(*args, **kwargs)
            except DivergedError:
                continue
            sites = [tracer.trace.nodes[name] for name in (self.joint.slices if self.joint else ())]
            yield torch.cat([biject_to(s["fn"].support).inv(s["value"]).reshape(-1) for s in sites])

    # Set-up: one run of the model tells its sites and plates.

    @torch.no_grad()
    def _set_up(self, run: Run) -> None:
        with own_randomness(), poutine.block(), poutine.trace() as tracer, PathsWithoutNoise():
            self.model(*run.args, **run.kwargs)
        nodes = {n: s for n, s in tracer.trace.nodes.items() if s["type"] == "sample"}
        check_masked(nodes, run.args)
        members = {n: s["value"] for n, s in nodes.items() if site_is_subsample(s)}
        latents = {
            n: s for n, s in nodes.items() if not (s["is_observed"] or n in members or is_enumerated(s))
        }
        frames = [f for s in nodes.values() for f in s["cond_indep_stack"] if f.vectorized]
        starts: dict[str, Start] = {}
        batch = series_of(run.args)
        for name, site in latents.items():
            place = Place.of(name, tuple(site["cond_indep_stack"]), members)
            with own_randomness():
                if is_path(site["fn"]):
                    seen = [s for s in starts.values() if seen_by_path(s.place, place, batch)]
                    features = sum(s.loc.shape[-1] for s in seen)
                    self._set_up_path(name, site["fn"], place, features, run)
                else:
                    starts[name] = prior_start(name, site["fn"], place)
        self._set_up_amortized({n: Latent(latents[n]["fn"], s.place) for n, s in starts.items()}, run)
        self._set_up_latents({n: s for n, s in starts.items() if n not in self.amortized})
        self._plates = max((-f.dim for f in frames), default=0)

    def _set_up_amortized(self, latents: Mapping[str, Latent], run: Run) -> None:
        if self.encoder is None or not self.amortized.plates:
            return
        with own_randomness():
            priors = [{n: latent.prior for n, latent in latents.items()}]
            priors += prior_runs(self.model, run, _PRIOR_RUNS)
            scales = pooled_scales(priors, self.amortized.plates)
            self.amortized.set_up(latents, run.args, scales, (self.encoder.hidden, self.hidden))

    def _set_up_latents(self, starts: Mapping[str, Start]) -> None:
        joint = {}
        for name, start in starts.items():
            if not isinstance(self.latents, MeanField) and not start.table_shape:
                joint[name] = start
            elif key_of(name) not in self.locals:
                self.locals[key_of(name)] = LocalNormal.begin(start, self.latents)
        if joint:
            if self.joint is None and isinstance(self.latents, Flow):
                self.joint = JointFlow.begin(joint, self.latents)
            elif self.joint is None:
                self.joint = JointNormal.begin(joint, self.latents)
            self.joint.arrange({name: start.loc.shape[-1] for name, start in joint.items()})

    def _set_up_path(self, name: str, prior: LatentPath, place: Place, upstream: int, run: Run) -> None:
        place.check_depth(prior.batch_shape)
        if key_of(name) not in self.paths:
            self.paths[key_of(name)] = self._new_path_site(prior, place, upstream, run)

    def _new_path_site(self, prior: LatentPath, place: Place, upstream: int, run: Run) -> nn.Module:
        if isinstance(prior, JumpDiffusionPath):
            check_family(self.family, place.name)
            return PathSite.begin(self.family, prior, place, self._features(upstream), self.hidden)
        encoded = 0 if self.encoder is None else self.encoder.hidden
        if isinstance(self.family, PosteriorDrift):
            return DriftSite.begin(self.family, prior, encoded + upstream, encoded)
        if isinstance(self.family, Marginals):
            sizes = (encoded, upstream, self.hidden) if encoded else None
            return MarginalSite.begin(self.family, prior, place, run, sizes)
        return PathSite.begin(self.family, prior, place, self._features(upstream), self.hidden)

    def _features(self, upstream: int) -> int | None:
        return None if self.encoder is None else self.encoder.hidden + 2 + upstream

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for group, kind in (("paths", _path_site_kind), ("locals", lambda _: LocalNormal)):
            modules, states = getattr(self, group), _grouped(state_dict, f"{prefix}{group}.")
            for key, state in states.items():
                if group == "paths":
                    self._check_control(key, state)
                if key not in modules or not _same_shapes(modules[key], state):
                    modules[key] = kind(state).of_state(state)
        state = _grouped(state_dict, prefix).get("joint")
        if state and (self.joint is None or not _same_shapes(self.joint, state)):
            flow = isinstance(self.latents, Flow)
            self.joint = JointFlow.of_state(state, self.latents) if flow else JointNormal.of_state(state)
        self._plates = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_control(self, key: str, state: Mapping[str, Tensor]) -> None:
        stored, own = any(k.startswith("control.") for k in state), getattr(self.family, "control", None)
        if stored != (own is not None):
            raise GuideError(
                f"The state of path site '{key}' has {'a' if stored else 'no'} control, this guide was made with "
                f"control={own}. Make it with the same `paths`."
            )

    # Posteriors.

    def _posterior(
        self, name: str, prior: dist.TorchDistribution, place: Place, run: Run
    ) -> dist.TorchDistribution:
        if isinstance(prior, LatentPath):
            return self._guided(name, prior, place, run)
        if self.joint is not None and name in self.joint.slices:
            return self.joint.posterior(name, prior, run.residuals)
        if key_of(name) in self.amortized.sites and self.encoder is not None:
            return self.amortized.posterior(prior, place, run, self.encoder)
        if key_of(name) in self.locals:
            site = self.locals[key_of(name)]
            q = site.posterior(prior, place)
            site.trained.check(run.args, place, learning=self._learning(), training=self.training)
            return q
        raise GuideError(
            f"site '{name}' was not there when the guide first ran; its sites were {self._known()}. A model must have "
            "the same latents in every run."
        )

    def _known(self) -> list[str]:
        joint = [] if self.joint is None else list(self.joint.slices)
        return sorted([*self.paths, *self.locals, *self.amortized.sites, *joint])

    def _median(self, name: str, prior: dist.TorchDistribution, place: Place) -> Tensor | None:
        if self.joint is not None and name in self.joint.slices:
            return self.joint.median(name, prior)
        if key_of(name) in self.amortized.sites:
            return self.amortized.median(name, prior)
        if key_of(name) in self.locals:
            return self.locals[key_of(name)].median(prior, place)
        return None

    def _sampled(self, name: str, q: Any, value: Tensor, place: Place, run: Run) -> None:
        if isinstance(q, MarginalPath):
            return
        if not isinstance(q, GuidedPath | GuidedJumpPath):
            if self.joint is not None and name in self.joint.slices:
                run.residuals.add(q, value)
            run.features[name] = q.free(value)
        elif self._learning() and isinstance(self.family, FilterMessage):
            self._path_site(name).follow(value, q.ts, place, self.family.follow)

    def _learning(self) -> bool:
        return self.training and torch.is_grad_enabled()

    # Messages.

    def _guided(
        self, name: str, prior: LatentPath, place: Place, run: Run
    ) -> GuidedPath | GuidedJumpPath | MarginalPath:
        site = self._path_site(name)
        if isinstance(site, DriftSite):
            return site.guided(self.encoder, prior, place, run, self.loop)
        if isinstance(site, MarginalSite):
            return in_use(site.marginal(self.encoder, prior, place, run))
        base = None
        if isinstance(self.family, FilterMessage):
            if name not in run.potentials:
                raise PathReached(name, prior, place)
            potential, around = run.potentials[name]
            if not self.family.learned:
                return unlearned(prior, potential, around, self.loop)
            if isinstance(prior, SDEPath):
                base = information_filter(prior, potential, around)
        elif self.encoder is not None:
            around = site.centre
        else:
            # The call stores the grid; the centre is a constant, so that the messages mean the same on any grid.
            self._around(PathReached(name, prior, place), run, lambda: prior_mode(prior))
            around = site.centre
        reading = None
        if self.encoder is None:
            signature = site.signature_of(run.args, prior.batch_shape)
            numbers, valid = site.table_numbers(prior.ts, place, signature, learning=self._learning())
            seen_by_score = numbers.detach()
        else:
            reading = site.read(self.encoder, prior, place, run)
            (numbers, seen_by_score), valid = site.encoded_numbers(reading), reading.valid
        if isinstance(prior, JumpDiffusionPath):
            return guided_jumps(
                prior, self.family, run.potentials[name], site.unit, (numbers, seen_by_score), valid
            )
        build = self.family.build
        message = masked(build(numbers, site.unit, around, base), valid)
        score = masked(build(seen_by_score, site.unit, around, base), valid)
        return prior.guided(message, score_message=score, loop=self.loop, **site.controlled(reading))

    def _path_site(self, name: str) -> PathSite:
        if key_of(name) not in self.paths:
            raise GuideError(
                f"path site '{name}' was not there when the guide first ran; it knew {self._known()}."
            )
        return self.paths[key_of(name)]

    def _potential(self, reached: PathReached, run: Run) -> tuple[Message, Tensor]:
        """The likelihood's message at the running estimate of the path, and that estimate."""
        smoother = Smoother(self.model, self._median, self._plates or 0, getattr(self.family, "refine", 0))
        plates = self._path_site(reached.name).plates
        around = self._around(reached, run, lambda: smoother.refined(reached, run, plates))
        around = smoother.expanded(around, run)
        return smoother.likelihood(reached, around, run), around

    @torch.no_grad()
    def _around(self, reached: PathReached, run: Run, make: Callable[[], Tensor]) -> Tensor:
        """Where messages are centred: what is stored for these data, else made now (and stored, in training)."""
        site, prior, place = self._path_site(reached.name), reached.prior, reached.place
        signature = site.signature_of(run.args, prior.batch_shape)
        around = site.stored(prior.ts, place, signature)
        if around is None:
            around = without_particles(make(), site.plates)
            if self.training:
                site.remember(prior.ts, around, place, signature)
        return around


def _path_site_kind(state: Mapping[str, Tensor]) -> type[PathSite] | type[DriftSite] | type[MarginalSite]:
    if "gap_numbers" in state or "gap_head.weight" in state:
        return MarginalSite
    return DriftSite if "dims" in state else PathSite


def _same_shapes(module: nn.Module, state: Mapping[str, Tensor]) -> bool:
    own = module.state_dict()
    return own.keys() == state.keys() and all(own[name].shape == state[name].shape for name in own)


def _grouped(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    out: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        if key.startswith(prefix):
            name, _, rest = key[len(prefix) :].partition(".")
            out.setdefault(name, {})[rest] = value
    return out
