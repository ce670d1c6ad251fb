"""The faults that codistill promises to survive, or to refuse in one line."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A fault, how the tests inject it, and the promise."""

    fault: str
    injection: str
    promise: str


CASES = dict(
    enumerate(
        (
            Case(
                "a setting that does not exist",
                "misspelt in a recipe, in its [method] table, as a flag",
                "status 2; names key, file and line, and the nearest key; no folder is made",
            ),
            Case(
                "a value out of range or of the wrong type",
                "every bound of every setting; words, lists, tables for numbers",
                "status 2; names setting, value and what is allowed, and the line of a recipe",
            ),
            Case("milestones that do not rise, or past the end", "as flags and in a recipe", "status 2; says the rule"),
            Case(
                "a network, method or data set that does not exist",
                "resnet21, depths that the family does not have",
                "status 2; the nearest names, or all of them",
            ),
            Case(
                "students that the method cannot use",
                "one student for each online method; a shared trunk for unlike networks",
                "status 2; says why, and what to change",
            ),
            Case(
                "shapes that cannot work together",
                "channel groups that do not go into the width; images too small for a network; unlike maps for one "
                "shared component",
                "status 2 before anything is written; names layer and shapes",
            ),
            Case(
                "a device or precision that is not there",
                "cuda without CUDA, a GPU index too high, a GPU without bf16",
                "status 2; never a silent change to the CPU",
            ),
            Case(
                "an output folder that cannot be used",
                "a file, below a file, a read-only file system, another run",
                "status 2; nothing is overwritten",
            ),
            Case(
                "two processes on one run folder",
                "a second process while the first one trains; the lock of a dead process",
                "status 2 with pid and host for the second; the first is not touched; a dead lock does not hold",
            ),
            Case(
                "a resumed run whose settings were changed",
                "edited config.json; another data set",
                "status 2; lists each changed key with both values",
            ),
            Case(
                "no data", "a folder that is missing or empty", "status 3; names the files wanted and where to get them"
            ),
            Case("an archive cut short", "half of it, and all but the last byte", "status 3; both sizes"),
            Case("an archive that is not the published one", "one byte changed", "status 3; both digests"),
            Case("a data file of the wrong length", "cut, and with extra bytes", "status 3; names file and record"),
            Case(
                "labels that cannot be",
                "out of range, a class without images, too few images",
                "status 3; names place and value",
            ),
            Case(
                "a data file that runs code when unpickled",
                "a batch that would write a file",
                "status 3; names the forbidden callable; the file is not written",
            ),
            Case(
                "an archive that writes elsewhere",
                "members ../x and /x, links, devices, a name twice",
                "status 3; nothing is written outside",
            ),
            Case(
                "an archive that never ends",
                "megabytes that unpack to gigabytes; a header that lies",
                "status 3 at the limit; memory stays bounded",
            ),
            Case(
                "an image that is not what it says",
                "a huge header, another size, no image at all",
                "status 3 before it is decoded; names the file",
            ),
            Case("a damaged image among many", "one file cut", "status 3; names the file; never a grey image"),
            Case(
                "arrays that are not images",
                "object arrays, NaN, one channel, none",
                "status 3; names array, type and shape; nothing is unpickled",
            ),
            Case(
                "batches that batch normalisation cannot use",
                "fewer images than a batch; a last batch of one image",
                "status 2 before training; says what to set",
            ),
            Case(
                "a damaged cache",
                "one byte changed after it was built",
                "built again from its source with a warning; status 3 without a source",
            ),
            Case(
                "death at any moment of a save",
                "the process ends at each system call of it",
                "resume finds the old state or the new one, and ends bitwise equal to an undisturbed run",
            ),
            Case(
                "a damaged newest checkpoint",
                "cut, empty, text",
                "one warning; the one before is used, and the end is bitwise equal",
            ),
            Case("one flipped bit in the weights", "anywhere in a checkpoint", "found by SHA-256; then as case 25"),
            Case("no checkpoint that is whole", "all damaged", "status 4; each file with its reason; none is deleted"),
            Case(
                "a checkpoint that runs code",
                "pickles, bare and in an archive",
                "status 4; nothing is executed; there is no unsafe second try",
            ),
            Case(
                "a checkpoint of another network",
                "other classes, missing and unexpected tensors",
                "status 4; the first tensor that differs, with both shapes",
            ),
            Case(
                "a checkpoint or index of another format",
                "a higher number; an index that is missing or wrong",
                "status 4 with both numbers; a missing index is made again from the files",
            ),
            Case(
                "a full disk during a save",
                "ENOSPC from write and fsync, a limit on file sizes",
                "the old state stays; a warning and another try at the next epoch; status 6 if the last one fails",
            ),
            Case(
                "a log that cannot be written",
                "a full disk under metrics.jsonl; nobody reads stdout",
                "training continues; status 6 for lost metrics, 0 for a closed stdout",
            ),
            Case(
                "a half-written last line of metrics.jsonl",
                "cut, and lines beyond the checkpoint",
                "resume drops them; no epoch twice, none missing",
            ),
            Case(
                "SIGTERM at any moment",
                "at random steps, in evaluation, during a save",
                "status 143; the resumed run ends bitwise equal to an undisturbed one",
            ),
            Case(
                "SIGINT, once and twice; SIGUSR1 and SIGUSR2",
                "sent to a training",
                "130; a second one acts at once; the others save and training continues",
            ),
            Case(
                "NaN or infinity",
                "in one student's loss, in a gradient only, in the fused classifier",
                "status 5; names who, epoch and learning rate; the bad state is never kept",
            ),
            Case(
                "memory that runs out", "at some step", "status 6; names the settings to reduce; the batch is not split"
            ),
            Case(
                "a rank that dies or raises",
                "two processes on the CPU, one killed, or without data",
                "all end within a minute; status 7; it can be resumed, and torchrun's restart does",
            ),
            Case(
                "a sweep with losses",
                "a killed worker, a run that diverges, one that cannot be",
                "the others finish; each loss is a row with its reason; status 7",
            ),
            Case(
                "a killed sweep; a clock set back",
                "the driver killed and started again",
                "finished runs are not repeated, half-done ones resumed; order never by the clock",
            ),
        ),
        start=1,
    )
)

CASES |= {
    41: Case(
        "a picture whose metadata are odd",
        "EXIF, ICC, XMP, text and comments that are damaged, cut, or bombs, in each format",
        "only pixels and orientation count: it is read",
    ),
    42: Case(
        "files of operating systems among the pictures",
        "Thumbs.db, desktop.ini, .DS_Store, __MACOSX, resource forks, streams of downloads",
        "passed over",
    ),
    43: Case("a class without test images", "its folder is empty, or missing", "one line; status 3 if it is missing"),
    44: Case(
        "many bad files among the pictures",
        "images cut, files of other kinds, some or a whole class",
        "status 3; one line names the first twenty and counts them; --skip-bad leaves them out, named and recorded",
    ),
    45: Case("class names in two Unicode forms", "composed and decomposed, in train and in test", "one class"),
    46: Case(
        "arrays of other forms",
        "negative strides, read-only, lists, tensors, other integers; class names that are numbers",
        "converted where no value changes; else a DataError before anything is written",
    ),
    61: Case(
        "progress as a number",
        "0.25, 0 and 1 to the losses of every method; 30, -0.1, NaN",
        "the terms of a tensor of that value; a usage error that says epoch / epochs",
    ),
    62: Case(
        "teacher checkpoints of other repositories",
        "weights under eight keys, nested, prefixed, unordered; .safetensors; argparse.Namespace and numpy beside them",
        "the teacher has the same logits; tensors and values only are read",
    ),
    63: Case(
        "options of one's own network or data set",
        "float, bool, Literal, Path, Optional, unions, aliases; postponed, or none at all",
        "the option has that type; else status 2 with what to write",
    ),
    64: Case(
        "a teacher checkpoint that is not of that network",
        "a pickled module, code, other keys, another order, .safetensors with foreign names",
        "status 4; names what was found; nothing in it runs, no order is guessed",
    ),
    71: Case(
        "a resume with other pixels, labels or classes",
        "the data set changed where it lies; classes swapped",
        "status 3; names what differs; config.json holds SHA-256 of images and labels",
    ),
    72: Case(
        "a data set that was moved",
        "evaluate, export and resume of its run",
        "status 3; the line names --data-dir, with which all of them work",
    ),
    73: Case(
        "a teacher that was moved, or replaced",
        "its folder renamed; another run in its place; one attached in Python",
        "status 4; the line names --override teacher=PATH, which resumes bit for bit, and takes the same weights only",
    ),
    74: Case(
        "arrays and networks of one's own in a later process",
        "resumed, evaluated, exported without them, and with them handed in",
        "one line that shows how to hand them in; then bitwise as without a break",
    ),
    75: Case(
        "a method or network that this program does not register",
        "a subclass of one's own; an entry gone from the registry",
        "status 4; not called damaged; it can be handed in; never another method in its place",
    ),
    85: Case(
        "a channel with hardly any spread",
        "white, empty, one odd pixel; all three; std 0, negative or NaN handed in, or in a file",
        "trained, evaluated and exported with a bounded deviation, in one line at the start; else status 3 or 4",
    ),
    86: Case(
        "fewer training images than a batch",
        "few at all, by --train-limit, --validation or the number of ranks; runs side by side",
        "trains with the batch that there is and says so once; status 2 below two images a rank",
    ),
    87: Case(
        "validation as a percentage",
        "20%, 12.5%; 0%, 100%, -5%, 20 %, 0.2, as a flag, in a recipe, in Python",
        "that part of the training images, at least one, is held out; else status 2 with what to write",
    ),
    88: Case(
        "pictures of further kinds",
        "PPM, JPEG 2000, AVIF, HEIC, MPO, of 1 and 16 bits, of several frames, turned by XMP; cut; with other names",
        "read with the right pixels, or one line, for HEIC with the package that it takes",
    ),
    89: Case(
        "a bench of one's own data",
        "--data with other sizes and classes, fewer images than a batch; no such data",
        "its images are timed; text and JSON say size, classes, networks, batch, precision, device and threads",
    ),
    51: Case(
        "one bad image among those to predict",
        "missing, cut; in a folder, with a link that leads back",
        "the others get their answers; a line for each bad one; status 3",
    ),
    52: Case(
        "an output that lacks letters",
        "ascii and cp1252, no stdout at all; brackets in paths",
        "shown as \\u732b; never an error",
    ),
    53: Case(
        "a drawing that fails",
        "an error while curves are drawn or pictures made; damaged predictions.npz, report-images.npz, latency.json",
        "that part is left out, the report says so, and the run finishes",
    ),
    54: Case(
        "commands at once without --out",
        "24 together; runs/ that cannot be made",
        "each has a folder of its own; status 2 in one line, and no folder is left",
    ),
    55: Case(
        "options of other tools",
        "--optimiser, --scheduler, --gpu, --workers, --amp; names like no other",
        "status 2; names what there is instead; only near names are suggested",
    ),
    56: Case("a command line within a thread", "a training", "trains; handlers of signals stay"),
    76: Case(
        "a student of another kind than ours",
        "plain tensors, branches on values, compiled stages, weight_norm, TorchScript, norms of one's own, "
        "SyncBatchNorm, tied and frozen weights, `view` of maps, tokens instead of maps",
        "trains as in a plain loop, in float32 and bf16; is resumed bitwise, evaluated, exported",
    ),
    77: Case(
        "a network whose outputs have another form",
        "logits of four dimensions, dicts, tuples (in training only), class indices; no Network, or one in a wrapper",
        "status 2 before a folder is made; names network, stage or head, what it returns and what it must return",
    ),
    78: Case(
        "a network that cannot be trained",
        "lazy, on meta, half precision, made in inference mode, a lock in it, all frozen; writes to what others read",
        "status 2 before a folder is made; names network and reason; only like students share stages",
    ),
    79: Case(
        "maps of other dimensions than the method works on",
        "tokens [batch, tokens, channels] with each method",
        "methods on logits train, each student on its own view; the others: status 2, with the form of the maps",
    ),
    80: Case(
        "a predictor that cannot be exported, or only with all of its constants",
        "a branch on values, TorchScript; plain tensors, unsaved buffers and values read when a network is made",
        "status 2 in one line and no file; else the file answers as the run",
    ),
    81: Case(
        "a teacher of the zoo that the field compares with",
        "_last.pth of RepDistiller: resnet8 to 110, 8x4, 32x4, wrn, vgg, with argparse.Namespace",
        "its network has a name; the same logits as of the authors' code",
    ),
    82: Case(
        "a teacher that knows nothing of the data",
        "weights of another forward pass or order of classes; NaN logits",
        "its test error is shown before training and is in summary.json; one that only guesses is warned of",
    ),
    99: Case(
        "a student chosen by the test errors that are then reported of it",
        "validation and test errors that disagree; ties; a run of an older version",
        "with --validation by validation error, in export, predict and teaching; summary.json says by which",
    ),
    100: Case(
        "an error of which nobody can tell on which images",
        "a run with --validation: progress, table, report, table of a sweep",
        "validation and test errors side by side, each named",
    ),
    101: Case(
        "a run evaluated on another test set",
        "images or labels that changed where they lie; handed in",
        "a warning in one line names what differs; the scores are of what is there",
    ),
    96: Case(
        "a network that draws numbers",
        "dropout, stochastic depth, Python's and NumPy's generators; in evaluation too; breaks, ranks, captured steps",
        "a function of seed, epoch, step and rank: resume is exact; the user's generators stay where they were",
    ),
    97: Case(
        "a run in Python that starts from weights of which nobody knows",
        "networks drawn without a seed, loaded, trained before; a cell run again; a recipe of such a run",
        "drawn from the run's seed, as on the command line, unless they are the user's; recorded and said",
    ),
    84: Case(
        "an exception in code of one's own that a command calls",
        "a network of a module that --import names",
        "status 2; one line with file and line; not called a bug",
    ),
    83: Case(
        "a mistake in a method of one's own",
        "no scalar, no tensor, no dict, no gradient, NaN, other names in another epoch, an exception in any part",
        "status 2 before a folder is made; one line with method, term, file and line; later, nothing is lost",
    ),
    57: Case("a run or a data set shown in a notebook", "repr of both", "one short line"),
    90: Case(
        "a module of one's own that cannot be imported, or is not",
        "--import of modules and files that raise, exit, take a name, are not there; later processes without it",
        "status 2, or 4 with the --import of the training; with it resumed bitwise, evaluated, exported; nothing is "
        "imported unasked",
    ),
    91: Case(
        "a file that the system refuses to write",
        "no space, quota, rights, read-only, long names, stale handles, too many files; in every file of a run, an "
        "export, a sweep, a download; stdout",
        "one line with path and reason; status 2 for a place and 6 for a resource; no part of a file; resumed bitwise",
    ),
    92: Case(
        "a package that is not installed",
        "onnx, onnxscript, onnxruntime, jinja2, matplotlib, tensorboard, scikit-learn",
        "status 2, or a warning where a run would be lost; the command that installs it into this environment",
    ),
    93: Case(
        "what looks like damage and is none",
        "no folder, an empty one, a file in its place, no permission, another version",
        "a line of its own; damage is said of damage only",
    ),
    94: Case(
        "progress in a notebook",
        "hundreds of steps in a cell; no IPython to show them",
        "one line that is replaced in place, and a line an epoch; never an error",
    ),
    95: Case(
        "odd paths",
        "brackets, spaces, quotes, dashes, bytes that are no UTF-8, in data, runs, exports and pictures",
        "trained, resumed bitwise, evaluated, exported and predicted; shown as they are, or escaped",
    ),
    103: Case(
        "cores that are too few, or busy",
        "more threads than cores; other programs; several runs on a CPU of which one is killed, fails or diverges; "
        "signals to all",
        "one line each; threads by a short measurement, recorded and kept on resume; a loss costs no other run",
    ),
}

CASES |= {
    130: Case(
        "a folder without test images, or with splits that do not fit",
        "train/ alone, class folders alone, val/ for test/, a split twice, one class, too few images to set some apart",
        "test images are drawn, of each class their share, said and recorded; else status 2 or 3 with what to do",
    ),
    131: Case(
        "a table of images that cannot be used, as a whole or in rows",
        "columns missing, twice, doubtful; rows without path or label, twice, of unknown splits and classes, of paths "
        "that lead out; files missing and cut; no UTF-8, open quotes, no JSON, no table",
        "status 3; one line with file and line, all bad rows and files at once; --skip-bad leaves them out",
    ),
    132: Case(
        "a folder of Hugging Face's datasets that cannot be used",
        "missing, of something else, half of any of its files, other columns and splits, images and classes missing or "
        "damaged; the package is not installed",
        "status 3 in one line, all bad rows at once, or 2 with the command that installs the package",
    ),
    133: Case(
        "images that are added after test images were drawn",
        "a folder without test images, evaluated and exported after the training with two images more",
        "status 3: no image that was trained on is scored as a test image",
    ),
}

CASES |= {
    150: Case(
        "a half-made or damaged file of decoded images",
        "a kill and an interruption after any batch; pixels or rows cut, flipped, out of order, renamed, gone; "
        "about.json cut or of another file; a disk that loses what was written",
        "never trained on: the next command checks what is there and finishes it, or makes it again with one line",
    ),
    151: Case(
        "no room or no place for decoded images",
        "a full disk, a place that cannot be written, too little memory; --stream on where there is no file",
        "status 2 or 6 in one line before anything is written, or a warning where they fit into memory",
    ),
    152: Case(
        "images that are streamed during training",
        "breaks, validation images, captured steps; the file cut or deleted meanwhile",
        "bit for bit the run with images in memory, also resumed; status 3 in one line",
    ),
}

CASES |= {
    170: Case(
        "a search that is stopped, killed or given twice",
        "stopped and killed between choice and end of a trial; a journal with half a line, half a trial, a left lock, "
        "damage; a second command; another space",
        "the same command goes on as if nothing had been, and repeats no trial; otherwise status 2 in one line",
    ),
    171: Case(
        "a report of a sweep that lost runs",
        "runs failed, diverged, not begun, damaged; unlike test sets; files of others in its place",
        "each is named with its reason and none is averaged over; what does not compare is not compared; nothing of "
        "others is overwritten",
    ),
}

CASES |= {
    180: Case(
        "a ledger that was edited, or a run that does not belong in it",
        "a number, seed or protocol changed; a line cut or of another form; runs cut short, extended, of other "
        "settings or data, with weights of their own or a teacher that is gone, changed or of another seed",
        "status 4, file and line; what cannot enter is named with what differs, and counts nowhere",
    ),
}
