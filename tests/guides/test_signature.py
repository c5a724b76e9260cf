"""Tables of posteriors are for the data that they were trained on."""

import pytest
import torch

import stochdyn as sd
from stochdyn.errors import GuideError
from stochdyn.guides.signature import same, series_signature
from tests.hierarchies import by_site, ragged, simulated, two_levels
from tests.programs import F64, elbos


def test_signatures_tell_data_apart_up_to_rounding():
    batch = simulated(2, seed=0)
    own = series_signature(batch)
    assert len(set(own.tolist())) == len(batch)
    assert same(own, series_signature(batch.extend([9.0]))).all()
    assert same(own, own * (1 + 1e-12)).all()
    assert not same(own, series_signature(simulated(2, seed=1))).any()


def test_posteriors_of_series_are_not_handed_to_others_of_the_same_number():
    data, other = simulated(2, seed=0), simulated(2, seed=1)
    guide = sd.AmortizedGuide(two_levels)
    sd.fit(two_levels, guide, data, steps=3, progress=False)
    for batch in (data, data[[4, 2]], data.extend([7.0])):
        guide.eval()
        guide(batch)
    with pytest.raises(
        GuideError, match=r"site 'theta', series \[0\].*other data.*amortize=\{'theta': plate\}"
    ):
        guide(other)
    guide.train()
    with torch.no_grad(), pytest.raises(GuideError, match="other data"):
        guide(other)
    guide(other)  # training may go on with other data
    guide.eval()
    guide(other)
    with pytest.raises(GuideError, match="other data"):
        guide(data)


def test_it_is_in_the_state():
    data = simulated(2, seed=0)
    guide = sd.AmortizedGuide(two_levels)
    guide(data)
    fresh = sd.AmortizedGuide(two_levels)
    fresh.load_state_dict(guide.state_dict())
    fresh.eval()
    fresh(data)
    with pytest.raises(GuideError, match="other data"):
        fresh(simulated(2, seed=1))


def test_amortised_and_grouped_latents_have_no_such_limit():
    data, other = simulated(2, seed=0), simulated(2, seed=1)
    guide = sd.AmortizedGuide(two_levels, sd.SetEncoder(1, 4).double(), amortize={"theta": "subject"})
    guide(data)
    guide.eval()
    assert torch.isfinite(elbos(two_levels, guide, other, draws=3)).all()
    table = sd.AmortizedGuide(by_site)
    table(data)
    table.eval()
    with pytest.raises(GuideError, match="other data"):
        table(ragged([[0.1, 0.2]] * 6, groups={"site": [0, 0, 0, 1, 1, 1]}))


def test_an_untrained_guide_may_be_evaluated_on_anything():
    guide = sd.AmortizedGuide(two_levels).eval()
    with torch.no_grad():
        guide(simulated(2, seed=0))
        guide(simulated(2, seed=1))
    assert guide.locals["theta"].loc.dtype == F64
