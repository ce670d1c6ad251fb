"""The passes over logits that the losses of n heads take, as Triton kernels: one forward and one backward for each.

Logits are read as a matrix of rows (head, batch) by classes; a program computes one row. Backward computes the
probabilities again from the logits, which costs less than to store and load them. No program adds to what another one
writes, so results repeat to the last bit. Everything is computed in float32 whatever the logits are.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

import triton
import triton.language as tl


@triton.jit
def _log_softmax(scores, row, classes, column, known, temperature):
    """Give log softmax(scores / temperature) of a row, and 0 where there is no class.

    A NaN in the row, or an infinity among its largest, makes all of it NaN: the sum does that even where the maximum
    passes over NaN.
    """
    value = tl.load(scores + row.to(tl.int64) * classes + column, known, float("-inf")).to(tl.float32) / temperature
    centred = value - tl.max(value, 0)
    return tl.where(known, centred - tl.log(tl.sum(tl.exp(centred), 0)), 0.0)


@triton.jit
def _divergence(
    logits,
    targets,
    row,
    classes,
    target_rows,
    column,
    known,
    temperature,
    epsilon,
    HAS_EPSILON: tl.constexpr,
):
    """Give the probabilities p and q of logits and target, q + epsilon, and log (q + epsilon) - log p, of one row."""
    log_p = _log_softmax(logits, row, classes, column, known, temperature)
    log_q = _log_softmax(targets, row % target_rows, classes, column, known, temperature)
    p = tl.where(known, tl.exp(log_p), 0.0)
    q = tl.where(known, tl.exp(log_q), 0.0)
    raised = q
    if HAS_EPSILON:
        raised = tl.where(known, q + epsilon, 0.0)
        log_q = tl.where(known, tl.log(q + epsilon), 0.0)
    return p, q, raised, log_q - log_p


@triton.jit
def cross_entropy_rows(logits, labels, losses, classes, label_rows, BLOCK_CLASSES: tl.constexpr):
    """Store -log softmax(logits)[label] of a row; a label that is no class gives NaN."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK_CLASSES)
    log_p = _log_softmax(logits, row, classes, column, column < classes, 1.0)
    label = tl.load(labels + row % label_rows)
    loss = -tl.sum(tl.where(column == label, log_p, 0.0), 0)
    tl.store(losses + row, tl.where((label >= 0) & (label < classes), loss, float("nan")))


@triton.jit
def cross_entropy_gradient(
    logits, labels, gradient, logits_gradient, classes, label_rows, batch, scale, BLOCK_CLASSES: tl.constexpr
):
    """Store the gradient of a row's logits: its head's incoming gradient times scale (softmax - one-hot label)."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK_CLASSES)
    known = column < classes
    log_p = _log_softmax(logits, row, classes, column, known, 1.0)
    label = tl.load(labels + row % label_rows)
    share = tl.load(gradient + row // batch).to(tl.float32) * scale
    change = share * (tl.exp(log_p) - tl.where(column == label, 1.0, 0.0))
    tl.store(logits_gradient + row.to(tl.int64) * classes + column, change, known)


@triton.jit
def divergence_rows(
    logits,
    targets,
    losses,
    classes,
    target_rows,
    temperature,
    epsilon,
    scale,
    HAS_EPSILON: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """Store scale sum_c (q + epsilon)_c (log (q + epsilon) - log p)_c of a row."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK_CLASSES)
    known = column < classes
    _, _, raised, apart = _divergence(
        logits, targets, row, classes, target_rows, column, known, temperature, epsilon, HAS_EPSILON
    )
    tl.store(losses + row, scale * tl.sum(raised * apart, 0))


@triton.jit
def divergence_gradients(
    logits,
    targets,
    gradient,
    logits_gradient,
    targets_gradient,
    classes,
    target_rows,
    batch,
    temperature,
    epsilon,
    scale,
    HAS_EPSILON: tl.constexpr,
    LEARNING_TARGETS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """Store the gradients of a row's logits and, where they learn, of its targets.

    The incoming gradient times scale is multiplied by p sum(q + epsilon) - (q + epsilon) for the logits, and for the
    targets by q (apart - sum(q apart)), apart = log (q + epsilon) - log p.
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK_CLASSES)
    known = column < classes
    p, q, raised, apart = _divergence(
        logits, targets, row, classes, target_rows, column, known, temperature, epsilon, HAS_EPSILON
    )
    share = tl.load(gradient + row // batch).to(tl.float32) * scale
    where = row.to(tl.int64) * classes + column
    tl.store(logits_gradient + where, share * (p * tl.sum(raised, 0) - raised), known)
    if LEARNING_TARGETS:
        tl.store(targets_gradient + where, share * (q * (apart - tl.sum(q * apart, 0))), known)
