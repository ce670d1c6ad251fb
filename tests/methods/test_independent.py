"""Independent training is what each student would do alone."""

import copy

import pytest
import torch

from codistill.methods.independent import Independent, IndependentSettings
from codistill.methods.terms import cross_entropy_terms
from codistill.networks.network import parameter_count


def test_shares_nothing_unless_asked(tiny_network):
    assert Independent([tiny_network(), tiny_network()], 3).cohort.shared_stages == 0
    shared = Independent([tiny_network(), tiny_network()], 3, IndependentSettings(shared_stages=None))
    assert shared.cohort.shared_stages == 2
    assert parameter_count(Independent([tiny_network() for _ in range(3)], 3)) == 3 * 819


def test_terms_by_hand():
    # -log softmax at the label: log(1 + e^-1) and log(2); their mean, and once more with the labels swapped.
    logits = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    terms = cross_entropy_terms([logits, logits.flip(1)], torch.tensor([0, 1]))
    assert list(terms) == ["ce/student0", "ce/student1"]
    assert terms["ce/student0"].item() == pytest.approx((0.31326168751822286 + 0.6931471805599453) / 2, abs=1e-12)
    assert terms["ce/student1"].item() == pytest.approx((1.3132616875182228 + 0.6931471805599453) / 2, abs=1e-12)


def test_one_student(tiny_network, batch):
    method = Independent([tiny_network()], 3).double().eval()
    outputs = method(batch[0])
    assert list(method.losses(outputs, batch[1], torch.tensor(0.0))) == ["ce/student0"]
    assert list(method.predictions(outputs)) == list(method.predictors()) == ["student0"]
    assert method.deployed_student(0) is method.cohort[0]


@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_students_train_as_if_alone(tiny_network, batch, progress):
    students = [tiny_network().double(), tiny_network(10, 1).double()]
    alone = [Independent([copy.deepcopy(student)], 3) for student in students]
    together = Independent(students, 3)
    optimizers = [torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9) for method in (together, *alone)]
    for _ in range(3):
        for method, optimizer in zip((together, *alone), optimizers, strict=True):
            optimizer.zero_grad()
            sum(method.losses(method(batch[0]), batch[1], torch.tensor(progress)).values()).backward()
            optimizer.step()
    for index, method in enumerate(alone):
        expected = method.cohort[0].state_dict()
        for name, tensor in together.cohort[index].state_dict().items():
            assert torch.equal(tensor, expected[name]), name
