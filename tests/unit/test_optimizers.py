"""A choice of optimizers is what it names, with its own options."""

import pytest
import torch
from hydra.utils import instantiate

from surflow.config import compose


@pytest.mark.parametrize(
    ("algorithm", "plain"),
    [
        ("adam", lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.5, 0.9))),
        ("rmsprop", lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.75)),
    ],
)
def test_the_chosen_one_steps_as_itself(algorithm, plain):
    overrides = [
        "optimizer=choice",
        f"optimizer.algorithm={algorithm}",
        "optimizer.lr=0.1",
        "optimizer.options.adam.betas=[0.5,0.9]",
        "optimizer.options.rmsprop.momentum=0.75",
    ]
    make = instantiate(compose(overrides).optimizer, _convert_="all")
    make.keywords.pop("name", None)
    found = []
    for maker in (make, plain):
        w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        optimizer = maker([w])
        for _ in range(5):
            optimizer.zero_grad()
            (w**4).sum().backward()
            optimizer.step()
        found.append(w.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)


def test_another_name():
    from surflow.training.optimizers import one_of

    known = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}
    with pytest.raises(ValueError, match=r"expected one of adam, rmsprop, got .sgd"):
        one_of([torch.nn.Parameter(torch.ones(1))], "sgd", 0.1, known)
