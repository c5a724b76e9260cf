"""Groups of series: read from labels and frames, kept by mini-batches, split into populations of their own."""

import math

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import stochdyn as sd
from stochdyn.data.groups import Grouping
from stochdyn.errors import DataError, ShapeError

LABELS = ["south", "north", "south", "east", "north", "south"]


def make(groups=None):
    return sd.Series(
        [0.0, 1.0],
        torch.arange(6.0)[:, None, None].expand(-1, 2, 1),
        ids=list("abcdef"),
        groups={"site": LABELS} if groups is None else groups,
    )


def names(series, name="site"):
    grouping = series.grouping(name)
    return [grouping.labels[k] for k in series.groups[name].tolist()]


def test_labels_become_sorted_groups():
    series = make()
    assert series.grouping("site").labels == ("east", "north", "south")
    assert series.groups["site"].tolist() == [2, 1, 2, 0, 1, 2]
    assert series.grouping("site").sizes.tolist() == [1, 2, 3]
    assert repr(series).endswith("torch.float32, 3 groups 'site')")
    assert make({}).groups == {}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (torch.tensor([3, 1, 1, 3, 3, 2]), (1, 2, 3)),
        (pd.Series([1.5, 0.5, 0.5, 0.5, 0.5, 0.5]), (0.5, 1.5)),
        ([("a", 1), ("a", 0), ("a", 1), ("a", 1), ("a", 1), ("a", 1)], (("a", 0), ("a", 1))),
        (["x", 3, "x", 3, "x", 3], (3, "x")),
    ],
)
def test_any_labels_will_do(labels, expected):
    assert make({"site": labels}).grouping("site").labels == expected


def test_a_mini_batch_knows_its_groups_and_all_others():
    batch = make()[[4, 0]][[1, 0]]
    assert names(batch) == ["south", "north"]
    assert batch.grouping("site").sizes.tolist() == [1, 2, 3]
    assert batch.extend([2.0]).groups["site"].tolist() == [2, 1]
    assert batch.to(torch.float64).groups["site"].tolist() == [2, 1]
    assert batch.to("meta").groups["site"].device.type == "meta"


def test_the_plate_holds_all_groups_and_is_not_scaled():
    def model(batch):
        with batch.group_plate("site", dim=-2) as index:
            pyro.sample("level", dist.Normal(0.0, 1.0))
        with batch.plate("series"):
            pyro.sample("x", dist.Normal(0.0, 1.0))
        return index

    trace = poutine.trace(model).get_trace(make()[[0, 1]])
    assert trace.nodes["level"]["value"].shape == (3, 1)
    assert trace.nodes["level"]["scale"] == 1.0
    assert trace.nodes["x"]["scale"] == 3.0
    assert trace.nodes["_RETURN"]["value"].tolist() == [0, 1, 2]


def test_a_split_makes_populations_with_groups_of_their_own():
    for seed in range(8):
        for part in make().split(0.5, seed=seed):
            assert names(part) == [LABELS["abcdef".index(name)] for name in part.ids]
            assert (part.grouping("site").sizes > 0).all()
            assert set(part.grouping("site").labels) == set(names(part))


def test_a_split_by_groups_keeps_them_whole():
    sides = set()
    for seed in range(8):
        first, second = make().split(0.6, seed=seed, by="site")
        assert not set(names(first)) & set(names(second))
        assert sorted(first.ids + second.ids) == list("abcdef")
        assert len(first.grouping("site")) == 2
        sides.add(first.ids)
    assert len(sides) > 1
    batch = make()[[0, 1]].split(0.5, by="site")[0]
    assert len(batch) == 1
    with pytest.raises(DataError, match=r"split\(0.1\) of 3 groups of 'site' leaves one side empty"):
        make().split(0.1, by="site")
    with pytest.raises(DataError, match=r"no groups 'ward', they have \['site'\]"):
        make().split(0.5, by="ward")


def test_lists_and_frames():
    rows = [([0.0], [[1.0]]), ([0.0, 1.0], [[1.0], [2.0]])]
    assert names(sd.Series.from_list(rows, groups={"site": ["b", "a"]})) == ["b", "a"]
    frame = pd.DataFrame(
        {"who": ["x", "y", "x"], "day": [1, 0, 0], "y": [1.0, 2.0, 3.0], "site": ["b", "a", "b"], "ward": 7}
    )
    series = sd.Series.from_frame(frame, "day", "y", "who", groups=["site", "ward"])
    assert series.ids == ("x", "y")
    assert names(series) == ["b", "a"]
    assert names(series, "ward") == [7, 7]
    assert names(sd.Series.from_frame(frame, "day", "y", "who", groups="site")) == ["b", "a"]
    frame.loc[2, "site"] = "c"
    with pytest.raises(DataError, match=r"series x: column 'site' has '.' and '.'.*one group"):
        sd.Series.from_frame(frame, "day", "y", "who", groups="site")
    with pytest.raises(DataError, match=r"Column 'town' is not in the data frame"):
        sd.Series.from_frame(frame, "day", "y", "who", groups="town")
    frame["site"] = [None, "a", None]
    with pytest.raises(DataError, match=r"`groups\['site'\]`, series 0: the label is missing"):
        sd.Series.from_frame(frame, "day", "y", "who", groups="site")


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (
            {"site": ["a", "b"]},
            ShapeError,
            r"`groups\['site'\]` must have one label for each of 6 series, got 2",
        ),
        ({"site": "abcdef"}, ShapeError, "one label for each of 6 series, got 'abcdef'"),
        ({"site": 3}, ShapeError, "got 3"),
        ({"site": [*LABELS[:5], None]}, DataError, "series 5: the label is missing.*of its own"),
        ({"site": [*LABELS[:5], math.nan]}, DataError, "series 5: the label is missing"),
        ({"site": [*LABELS[:5], []]}, DataError, "series 5: list cannot be a label"),
        (LABELS, DataError, r"`groups` must be a dict from names to labels, got list"),
        ({3: LABELS}, DataError, "must be a dict from names"),
    ],
)
def test_what_is_refused(groups, error, message):
    with pytest.raises(error, match=message):
        make(groups)


def test_unknown_groups_are_named():
    with pytest.raises(DataError, match=r"no groups 'ward', they have \['site'\].*groups=\{'ward': labels\}"):
        make().group_plate("ward")


def test_parts_drop_empty_groups():
    grouping = Grouping(("a", "b", "c"), torch.tensor([2, 0, 2, 1]))
    part = grouping.part(torch.tensor([2, 3]))
    assert part.labels == ("b", "c")
    assert part.member.tolist() == [1, 0]
    assert len(part) == 2
