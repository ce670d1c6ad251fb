"""ResNets of the ImageNet widths, changed for 32x32 images: ResNet-18."""

from codistill.networks.network import NETWORKS, Network
from codistill.networks.resnet import basic_resnet


@NETWORKS.register("resnet18")
def resnet18(num_classes: int) -> Network:
    """Build ResNet-18 for 32x32 images.

    The feature map is [512, 4, 4]; stem and stages 1 to 3 are the usual shared trunk.

    Source: He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, CVPR 2016, arXiv 1512.03385, table 1;
        the form for 32x32 images: github.com/kuangliu/pytorch-cifar, which CINIC-10's benchmark (Darlow et al.,
        arXiv 1810.03505) names as its source.
    Differs: from the paper, a 3x3 stem of stride 1 and no max-pooling, as in that code.
    """
    return basic_resnet(num_classes, (64, 128, 256, 512), 2, "B")
