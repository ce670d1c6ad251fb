"""The four published CIFAR archives: their names, sizes and digests, and how to read the files inside."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from codistill.data.cifar_files import decode_batch, decode_lines, decode_meta, decode_records
from codistill.data.dataset import Labels, Pixels

HOST = "https://www.cs.toronto.edu/~kriz/"


@dataclass(frozen=True)
class Release:
    """One published archive of one data set.

    Attributes:
        archive: File name of the archive.
        size: Of the archive, bytes.
        digest: Of the archive.
        folder: Folder inside the archive, and the one that it is extracted to.
        train: Files with training images, in order.
        test: File with test images.
        names: File with the class names.
        digests: Of the files inside, as far as published.
        decode: From a file's bytes and its name for error lines to images and labels.
        decode_names: From the bytes of the file `names`, likewise, to class names.
    """

    archive: str
    size: int
    digest: str
    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    digests: Mapping[str, str]
    decode: Callable[[bytes, str, str], tuple[Pixels, Labels]]
    decode_names: Callable[[bytes, str, str], tuple[str, ...]]

    @property
    def files(self) -> tuple[str, ...]:
        """All files that are read."""
        return (self.names, *self.train, self.test)


# Sizes and digests: torchvision's and Keras' loaders (python archives and their files), torchvision for Ruby (binary).
CIFAR10 = (
    Release(
        archive="cifar-10-binary.tar.gz",
        size=170_052_171,
        digest="sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{index}.bin" for index in range(1, 6)),
        test="test_batch.bin",
        names="batches.meta.txt",
        digests={
            "data_batch_1.bin": "sha256:cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            "data_batch_2.bin": "sha256:a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            "data_batch_3.bin": "sha256:bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            "data_batch_4.bin": "sha256:014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            "data_batch_5.bin": "sha256:755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
            "test_batch.bin": "sha256:8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
        },
        decode=partial(decode_records, label_bytes=1),
        decode_names=decode_lines,
    ),
    Release(
        archive="cifar-10-python.tar.gz",
        size=170_498_071,
        digest="sha256:6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{index}" for index in range(1, 6)),
        test="test_batch",
        names="batches.meta",
        digests={
            "data_batch_1": "md5:c99cafc152244af753f735de768cd75f",
            "data_batch_2": "md5:d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "md5:54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "md5:634d18415352ddfa80567beed471001a",
            "data_batch_5": "md5:482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "md5:40351d587109b95175f43aff81a1287e",
            "batches.meta": "md5:5ff9c542aee3614f3951f8cda6e48888",
        },
        decode=partial(decode_batch, label_key="labels"),
        decode_names=partial(decode_meta, key="label_names"),
    ),
)
CIFAR100 = (
    Release(
        archive="cifar-100-binary.tar.gz",
        size=168_513_733,
        digest="sha256:58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        folder="cifar-100-binary",
        train=("train.bin",),
        test="test.bin",
        names="fine_label_names.txt",
        digests={
            "train.bin": "sha256:f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
            "test.bin": "sha256:d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
        },
        decode=partial(decode_records, label_bytes=2),
        decode_names=decode_lines,
    ),
    Release(
        archive="cifar-100-python.tar.gz",
        size=169_001_437,
        digest="sha256:85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        folder="cifar-100-python",
        train=("train",),
        test="test",
        names="meta",
        digests={
            "train": "md5:16019d7e3df5f24257cddd939b257f8d",
            "test": "md5:f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "md5:7973b15100ade9c7d40fb424638fde48",
        },
        decode=partial(decode_batch, label_key="fine_labels"),
        decode_names=partial(decode_meta, key="fine_label_names"),
    ),
)
