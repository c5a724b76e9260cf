"""NONMEM's event table."""

import math

import pandas
import pytest

import stochdyn as sd


def table(**columns):
    return pandas.DataFrame({"ID": [1, 1, 1, 2, 2], "TIME": [0.0, 1.0, 2.0, 0.0, 3.0]} | columns)


def test_all_columns():
    frame = table(
        AMT=[100.0, 0.0, 50.0, ".", 30.0], EVID=[1, 0, 4, 3, 1], CMT=[1, 2, "2", ".", 1], RATE=[0, 0, 25.0, 0, 0],
        ADDL=[2, 0, 0, 0, 0], II=[8.0, 0, 0, 0, 0], DUR=[0, 0, 0, 0, 1.5],
    )  # fmt: skip
    doses = sd.Doses.from_frame(frame, "ID")
    assert doses.times.tolist() == [[0.0, 2.0, 2.0, 8.0, 16.0], [0.0, 3.0, math.inf, math.inf, math.inf]]
    assert doses.amounts[0].tolist() == [100.0, 0.0, 50.0, 100.0, 100.0]
    assert doses.reset.tolist()[0][:3] == [False, True, False] and doses.reset[1, 0]
    assert doses.compartment[0, 2] == 1 and doses.duration[0, 2] == 2.0 and doses.duration[1, 1] == 1.5


def test_rows_with_an_amount_are_doses_where_nothing_else_is_said():
    frame = table(AMT=[4.0, math.nan, 0.0, 5.0, None], CMT=["gut"] * 5).rename(columns={"TIME": "hour"})
    doses = sd.Doses.from_frame(
        frame, "ID", ids=[3, 2, 1], compartments=["gut", "blood"], columns={"TIME": "hour"}
    )
    assert doses.ids == (3, 2, 1)
    assert doses.times[:, 0].tolist() == [math.inf, 0.0, 0.0] and doses.amounts[1:, 0].tolist() == [5.0, 4.0]


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({}, sd.DataError, r"there is no column 'AMT'"),
        ({"AMT": [1, 0, 0, 0, 0], "SS": [1, 0, 0, 0, 0]}, sd.DataError, r"row 0, series 1: steady state"),
        ({"AMT": [1, 0, 0, 0, 0], "RATE": [-2, 0, 0, 0, 0]}, sd.DataError, r"RATE -2 asks for an estimated"),
        ({"AMT": [1, 0, 0, 0, 0], "EVID": [7, 0, 0, 0, 0]}, sd.DataError, r"EVID is 7"),
        ({"AMT": [1, 2, 0, 0, 0], "EVID": [1, 0, 0, 0, 0]}, sd.DataError, r"row 1, series 1: an observation .* AMT 2"),
        ({"AMT": ["x", 0, 0, 0, 0]}, sd.DataError, r"row 0, column AMT: 'x' is not a number"),
        ({"AMT": [1, 0, 1, 0, 0], "TIME": [1.0, 0, 0.5, 0, 0]}, sd.TimeError, r"row 2, series 1: time 0.5 comes after 1"),
        ({"AMT": [1, 0, 0, 2, 0], "TIME": [1.0, 2, 3, math.nan, 0]}, sd.DataError, r"row 3, series 2: TIME is nan"),
        ({"AMT": [1, 0, 0, 2, 0], "TIME": [1.0, 2, 3, ".", 0]}, sd.DataError, r"row 3, series 2: TIME is '\.'"),
        ({"AMT": [1, 0, 0, 2, 0], "TIME": [1.0, 2, 3, math.inf, 0]}, sd.DataError, r"row 3, series 2: TIME is inf"),
        ({"AMT": [1, 0, 0, math.nan, 0], "EVID": [1, 0, 0, 1, 0]}, sd.DataError, r"row 3, series 2: a dose \(EVID 1\) with AMT nan"),
        ({"AMT": [1, 0, 0, 0, 0], "EVID": [1, 4, 0, 0, 0]}, sd.DataError, r"row 1, series 1: a dose \(EVID 4\) with AMT 0"),
        ({"AMT": [1, 0, 0, 2, 0], "CMT": [1, 1, 1, 1.5, 1]}, sd.DataError, r"row 3, series 2: CMT is 1.5"),
        ({"AMT": [1, 0, 0, 2, 0], "ADDL": [0, 0, 0, 1.7, 0], "II": [8.0] * 5}, sd.DataError, r"row 3, series 2: ADDL is 1.7"),
        ({"AMT": [1, 0, 0, 0, 0], "ADDL": [3, 0, 0, 0, 0]}, sd.TimeError, r"3 additional doses need"),
    ],
)  # fmt: skip
def test_faults_have_names(columns, error, message):
    with pytest.raises(error, match=message):
        sd.Doses.from_frame(table(**columns), "ID")


def test_labels_that_are_not_there():
    frame = table(AMT=[1.0] * 5)
    with pytest.raises(sd.DataError, match="no column 'subject'"):
        sd.Doses.from_frame(frame, "subject")
    with pytest.raises(sd.DataError, match="row 3 is of series 2, which is not among the ids"):
        sd.Doses.from_frame(frame, "ID", ids=[1])
    with pytest.raises(sd.DataError, match=r"unknown columns \['DOSE'\]"):
        sd.Doses.from_frame(frame, "ID", columns={"DOSE": "AMT"})


def test_observations_need_no_time():
    frame = table(AMT=[1.0, 0.0, 0.0, 2.0, 0.0], TIME=[0.0, math.nan, 2.0, 0.0, "."])
    assert sd.Doses.from_frame(frame, "ID").amounts[:, 0].tolist() == [1.0, 2.0]
