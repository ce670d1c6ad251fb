from codistill.methods.cohort import Cohort
from codistill.networks.network import parameter_count, probe_shapes


def test_counts_shapes_and_split(on_meta):
    built = on_meta("resnet18", 10)
    assert parameter_count(built) == 11_173_962
    assert parameter_count(on_meta("resnet18", 100)) == 11_173_962 + 90 * 513
    assert parameter_count(built.stages[:-1]) == 2_775_104
    assert parameter_count(built.stages[-1]) + parameter_count(built.head) == 8_398_858
    shapes = [(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert probe_shapes(built, (32, 32)) == shapes


def test_two_branches_on_one_trunk(on_meta):
    assert parameter_count(Cohort([on_meta("resnet18", 10) for _ in range(2)])) == 19_572_820
