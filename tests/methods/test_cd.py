"""CD: the means of channels, the guided KL, the early decay, a whole step against a slow derivation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from codistill.core.errors import UsageError
from codistill.data.mixing import soft_labels
from codistill.methods.cd import CD
from codistill.methods.cohort import Outputs
from codistill.networks.network import parameter_count

from . import slow

METHOD = CD
CHANNEL, GUIDED = "channel/teacher->student0", "guided/teacher->student0"
# Of three classes; the teacher is right if the label is 0.
STUDENT, TEACHER = [2.0, 0.5, -1.0], [3.0, 0.0, -2.0]


def of_means(*means: float) -> torch.Tensor:
    """A map of 1x2 places whose channels have these means."""
    return torch.tensor([[[[2 * mean, 0.0]] for mean in means]])


def terms_at(method, labels, progress=0.0) -> dict[str, float]:
    count = len(labels)
    outputs = Outputs(
        (torch.tensor([STUDENT] * count),),
        (),
        teacher_logits=torch.tensor([TEACHER] * count),
        stage_maps=((of_means(1, 2).expand(count, -1, -1, -1),),),
        teacher_maps=tuple(each.expand(count, -1, -1, -1) for each in (of_means(5, 5), of_means(0, 4))),
    )
    terms = method.losses(outputs, torch.tensor(labels), torch.tensor(progress))
    return {name: each.item() for name, each in terms.items()}


def test_terms_by_hand(taught):
    # Means (1, 2) and (0, 4): (1 + 4) / 2 = 2.5, times 6. KL at T = 1 of the right image alone.
    terms = terms_at(taught((8, 2)), [0, 1])
    assert list(terms) == ["ce/student0", GUIDED, CHANNEL]
    assert terms[CHANNEL] == pytest.approx(15)
    assert terms["ce/student0"] == pytest.approx((0.2413113 + 1.7413113) / 2)
    assert terms[GUIDED] == pytest.approx(0.1 * slow.divergence(TEACHER, STUDENT), rel=1e-5)
    hotter = terms_at(taught((8, 2), guided_weight=1.0, guided_temperature=3.0), [0, 0])
    assert hotter[GUIDED] == pytest.approx(0.34763351, rel=1e-5)


def test_no_right_image_is_no_loss(taught):
    assert terms_at(taught((8, 2)), [1, 2])[GUIDED] == 0


def test_right_is_the_class_of_the_largest_share(taught, batch):
    method = taught((8, 2))
    outputs = method(batch[0])
    hard = method.losses(outputs, batch[1], 0.5)[GUIDED]
    mixed = torch.lerp(soft_labels(batch[1], 3).double(), torch.ones(6, 3).double() / 3, 0.4)
    torch.testing.assert_close(method.losses(outputs, mixed, 0.5)[GUIDED], hard)


@pytest.mark.parametrize(
    ("epoch", "channels", "others"),
    [(0, 1, 0), (59, 1, 0), (60, 0.9, 1), (159, 0.9, 1), (160, 0.81, 1), (199, 0.81, 1)],
)
def test_the_early_decay(taught, epoch, channels, others):
    plain = terms_at(taught((8, 2)), [0], epoch / 200)
    decayed = terms_at(taught((8, 2), decay=0.9, silent_share=0.3), [0], epoch / 200)
    factors = {"ce/student0": others, GUIDED: others, CHANNEL: channels}
    assert decayed == pytest.approx({name: factors[name] * each for name, each in plain.items()}, rel=1e-6)


def by_hand(method, batch, last_strides, teacher_stride):
    images, labels = batch
    maps, logits = slow.run_students(method, images, last_strides)
    network = method.taught_by.network
    taught = slow.stage_outputs(network, images, (1, 1, teacher_stride), trained=False)
    targets = slow.head_logits(network, taught[-1])
    loss = sum(slow.ce(each, labels) for each in logits)
    right = [row for row, label in enumerate(labels) if targets[row].argmax() == label]
    for index, own in enumerate(maps):
        for number in (1, 2):
            conv, norm = method.connectors[index][number - 1]
            connected = slow.batch_norm(F.conv2d(own[number], conv.weight), norm).clamp(min=0)
            difference = slow.pooled(connected) - slow.pooled(taught[number])
            loss = loss + 6 * (difference**2).sum() / difference.numel()
        loss = loss + 0.1 * slow.kl(slow.probabilities(targets[right]), logits[index][right], 1.0)
    assert 0 < len(right) < len(labels)
    return loss


@pytest.mark.parametrize(("shapes", "teacher"), [([(8, 2), (8, 2)], (8, 2)), ([(8, 2), (5, 1)], (12, 2))])
def test_a_step_against_a_slow_derivation(taught, batch, shapes, teacher):
    method = taught(*shapes, teacher=teacher)
    slow.assert_step_agrees(method, batch, 10, by_hand(method, batch, [last for _, last in shapes], teacher[1]))


def test_which_modules_the_terms_reach(taught, batch):
    method = taught((8, 2), (8, 2))
    between = {f"connector{index}": each for index, each in enumerate(method.connectors)}
    assert slow.reached(method, batch, CHANNEL, **between) == {"branch0", "connector0"}
    assert slow.reached(method, batch, GUIDED, **between) == {"branch0", "head0"}


def test_connectors_are_there_between_equal_widths_too(taught):
    (each,) = taught((8, 2)).connectors
    assert [type(layer[0]) for layer in each] == [nn.Conv2d, nn.Conv2d]
    assert parameter_count(each) == 6 * 6 + 2 * 6 + 8 * 8 + 2 * 8


def test_bad_settings_are_refused(taught):
    for name, value in (("decay", 1.5), ("silent_share", 1.0), ("guided_temperature", 0.0), ("channel_weight", -1.0)):
        with pytest.raises(UsageError, match=rf"method\.{name} is {value}; it must be"):
            taught(**{name: value})
