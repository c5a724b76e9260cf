import torch

import stochdyn as sd

F64 = torch.float64


def test_it_is_a_gru_from_the_last_observed_time_to_the_first():
    torch.manual_seed(0)
    times = torch.tensor([0.0, 0.3, 1.0, 1.2, 2.0], dtype=F64)
    mask = torch.tensor([[1, 1], [0, 0], [1, 0], [1, 1], [0, 0]]).bool()
    values = torch.randn(5, 2, dtype=F64)
    net = sd.GRUEncoder(2, hidden=6).double()
    got = net(sd.Series.from_list([(times, values, mask), (times[:2], values[:2])]))[0]
    cell = torch.nn.GRUCell(5, 6).double()
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in net.gru.state_dict().items()})
    h, later = torch.zeros(1, 6, dtype=F64), None
    for k in (3, 2, 0):
        gap = torch.zeros(1, dtype=F64) if later is None else times[later : later + 1] - times[k]
        h, later = cell(torch.cat([values[k] * mask[k], mask[k].double(), gap])[None], h), k
        torch.testing.assert_close(got[k], h[0], rtol=0, atol=1e-12)
    assert torch.equal(got[1], got[2])
    assert not got[4].any()
