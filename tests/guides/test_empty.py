import copy

import pyro
import torch
from torch import nn

from stochdyn.guides.empty import EmptyGuide


def test_it_samples_nothing_and_names_the_models_parameters():
    model = nn.Linear(2, 1)
    guide = EmptyGuide(model)
    assert list(guide.parameters()) == [] and list(guide.state_dict()) == []
    nodes = pyro.poutine.trace(guide).get_trace(None).nodes
    found = {site["value"].unconstrained() for site in nodes.values() if site["type"] == "param"}
    assert found == set(model.parameters())
    assert not any(site["type"] == "sample" for site in nodes.values())
    assert not list(pyro.get_param_store().keys())


def test_a_copy_has_names_and_a_model_of_its_own():
    guide = EmptyGuide(nn.Linear(2, 1))
    twin = copy.deepcopy(guide)
    names = [
        {n for n, site in pyro.poutine.trace(g).get_trace(None).nodes.items() if site["type"] == "param"}
        for g in (guide, twin)
    ]
    assert not names[0] & names[1]
    assert twin.model is not guide.model
    assert torch.equal(twin.model.weight, guide.model.weight)
