"""The Triton kernels. `step` launches them, and documents what they read and write.

Each program holds whole rows of d values, so that every vector is read once. `ACC` is the type of
all computations; `WIDTH` is the next power of two from d on. No float is added atomically: the
order of every sum depends on the shapes alone.
"""

import triton
import triton.language as tl


@triton.jit
def _inverse_norm(rows, TINY: tl.constexpr):
    """Inverse norms over the last dimension; 0 for a zero vector, as in `_ops.vector_norms`."""
    norm = tl.sqrt(tl.sum(rows * rows, -1))
    return 1 / tl.where(norm <= TINY, float("inf"), norm)


@triton.jit
def _clamp(value, least, most):
    """Clamps; NaN stays NaN."""
    return tl.where(value < least, least, tl.where(value > most, most, value))


@triton.jit
def read(
    features,
    target,
    centers,
    partial,
    classes,
    samples,
    rows,
    num_samples,
    num_classes,
    d,
    ignore_index,
    blocks,
    rows_each,
    TINY: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Reads a block of centers (the first `blocks` programs) or a sample (the others)."""
    program = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    inside = columns < d
    if program < blocks:
        total = tl.zeros((ROWS, WIDTH), ACC)
        nonzero = tl.zeros((ROWS,), ACC)
        first = program.to(tl.int64) * rows_each
        last = tl.minimum(first + rows_each, num_classes)
        for start in range(first, last, ROWS):
            row = start + tl.arange(0, ROWS).to(tl.int64)
            mask = row < last
            both = mask[:, None] & inside[None, :]
            tile = tl.load(centers + row[:, None] * d + columns[None, :], both, other=0.0).to(ACC)
            inverse = _inverse_norm(tile, TINY)
            tl.store(classes + row, inverse, mask)
            tl.store(classes + num_classes.to(tl.int64) + row, tl.zeros((ROWS,), ACC), mask)
            total += tile * inverse[:, None]
            nonzero += tl.where(inverse != 0, 1.0, 0.0)
        tl.store(partial + program * d + columns, tl.sum(total, 0), inside)
        tl.store(partial + blocks * d + program, tl.sum(nonzero, 0))
    else:
        sample = (program - blocks).to(tl.int64)
        label = tl.load(target + sample).to(tl.int64)
        counted = (label != ignore_index) & (label >= 0) & (label < num_classes)
        mask = columns < tl.where(counted, d, 0)
        x = tl.load(features + sample * d + columns, mask, other=0.0).to(ACC)
        row = tl.load(centers + label * d + columns, mask, other=0.0).to(ACC)
        inverse = _inverse_norm(x, TINY)
        row *= _inverse_norm(row, TINY)
        cosine = _clamp(tl.sum(x * inverse * row, 0), -1.0, 1.0)
        tl.store(rows + sample * d + columns, row, inside)
        tl.store(samples + sample, cosine)
        tl.store(samples + num_samples + sample, inverse)


@triton.jit
def finish(
    target,
    partial,
    samples,
    classes,
    total,
    loss,
    numbers,
    num_samples,
    num_classes,
    d,
    ignore_index,
    blocks,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BATCH: tl.constexpr,
):
    """In one program: Eq. 3, the mean of Eq. 2, their sum, and which classes are in the batch."""
    columns = tl.arange(0, WIDTH)
    inside = columns < d
    sums = tl.zeros((ROWS, WIDTH), ACC)
    nonzero = tl.zeros((ROWS,), ACC)
    for start in range(0, blocks, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = row < blocks
        both = mask[:, None] & inside[None, :]
        sums += tl.load(partial + row[:, None] * d + columns[None, :], both, other=0)
        nonzero += tl.load(partial + blocks * d + row, mask, other=0)
    whole = tl.sum(sums, 0)
    tl.store(total + columns, whole, inside)
    c = num_classes.to(ACC)
    inter = 0.5 + (tl.sum(whole * whole, 0) - tl.sum(nonzero, 0)) / (2 * c * (c - 1))
    inter = _clamp(inter, (c - 2) / (2 * (c - 1)), 1.0)

    terms = tl.zeros((BATCH,), ACC)
    count = tl.zeros((BATCH,), tl.int32)
    finite = tl.zeros((BATCH,), tl.int32)
    wrong = tl.zeros((BATCH,), tl.int32)
    for start in range(0, num_samples, BATCH):
        sample = start + tl.arange(0, BATCH)
        mask = sample < num_samples
        label = tl.load(target + sample, mask, other=0).to(tl.int64)
        cosine = tl.load(samples + sample, mask, other=0)
        counted = mask & (label != ignore_index)
        in_range = (label >= 0) & (label < num_classes)
        tl.store(classes + num_classes.to(tl.int64) + label, 1.0, counted & in_range)
        terms += tl.where(counted, 0.5 - 0.5 * cosine, 0.0)
        count += counted.to(tl.int32)
        finite += (counted & (tl.abs(cosine) <= 1)).to(tl.int32)
        wrong += (counted & ~in_range).to(tl.int32)
    share = 1.0 / tl.maximum(tl.sum(count, 0), 1).to(ACC)
    intra = tl.sum(terms, 0) * share
    tl.store(loss, intra + inter)
    tl.store(numbers, intra)
    tl.store(numbers + 1, inter)
    tl.store(numbers + 2, share)
    tl.store(numbers + 3, 1.0 / tl.maximum(tl.sum(finite, 0), 1).to(ACC))
    tl.store(numbers + 4, (tl.sum(wrong, 0) == 0).to(ACC))


@triton.jit
def features_gradient(
    grad,
    features,
    target,
    samples,
    rows,
    numbers,
    out,
    num_samples,
    d,
    ignore_index,
    ACC: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """For each sample, Eq. 5 times the gradient of the loss."""
    sample = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < d
    here = sample * d + columns
    counted = tl.load(target + sample).to(tl.int64) != ignore_index
    x = tl.load(features + here, columns < tl.where(counted, d, 0), other=0.0).to(ACC)
    row = tl.load(rows + here, inside, other=0.0)
    cosine = tl.load(samples + sample)
    inverse = tl.load(samples + num_samples + sample)
    factor = -0.5 * tl.load(grad) * tl.load(numbers + 2) * inverse
    tl.store(out + here, factor * (row - cosine * (x * inverse)), inside)


@triton.jit
def move(
    grad,
    features,
    target,
    centers,
    samples,
    classes,
    total,
    numbers,
    out,
    num_samples,
    num_classes,
    d,
    ignore_index,
    rate: tl.float64,
    PER_SAMPLE: tl.constexpr,
    PAPER: tl.constexpr,
    START: tl.constexpr,
    LABELS: tl.constexpr,
    TINY: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """For a few centers, with `PAPER` Eq. 8, else their gradient times that of the loss."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    mask, inside = row < num_classes, columns < d
    both = mask[:, None] & inside[None, :]
    here = row[:, None] * d + columns[None, :]
    center = tl.load(centers + here, both, other=0.0).to(ACC)
    inverse = tl.load(classes + row, mask, other=0)
    present = tl.load(classes + num_classes.to(tl.int64) + row, mask, other=0)
    sums = tl.zeros((ROWS, WIDTH), ACC)
    count = tl.zeros((ROWS,), ACC)
    if tl.max(present, 0) > 0:
        chunk = features + columns
        for start in range(0, num_samples, LABELS):
            several = start + tl.arange(0, LABELS)
            labels = tl.load(target + several, several < num_samples, other=ignore_index)
            labels = labels.to(tl.int64)
            here_too = (labels >= first) & (labels < first + ROWS) & (labels != ignore_index)
            if tl.max(here_too.to(tl.int32), 0) > 0:
                x = chunk
                for i in range(start, tl.minimum(start + LABELS, num_samples)):
                    label = tl.load(target + i).to(tl.int64)
                    if (label >= first) & (label < first + ROWS) & (label != ignore_index):
                        cosine = tl.load(samples + i)
                        inverse_x = tl.load(samples + num_samples + i)
                        # Eq. 8 ignores samples that are not finite: their cosines are NaN.
                        if (tl.abs(cosine) <= 1) | (not PAPER):
                            unit = tl.load(x, inside, other=0.0).to(ACC) * inverse_x
                            own = row == label
                            sums += tl.where(own[:, None], unit[None, :], 0.0)
                            count += tl.where(own, 1.0, 0.0)
                    x += d
            chunk += LABELS * d
    c = num_classes.to(ACC)
    if PAPER:
        alpha = (tl.full((), 1, ACC) * rate).to(ACC)
        if PER_SAMPLE:
            alpha = tl.minimum(alpha / tl.load(numbers + 3), 4 * (c - 1))
        push = -alpha / (2 * c * (c - 1))
        pull = 0.5 * alpha * tl.load(numbers + 3) / (1 + count)
    else:
        push = tl.load(grad) / (c * (c - 1))
        pull = -0.5 * tl.load(grad) * tl.load(numbers + 2) + tl.zeros((ROWS,), ACC)
    both_sums = push * tl.load(total + columns, inside, other=0)[None, :] + pull[:, None] * sums
    # The derivative of normalising a center.
    unit = center * inverse[:, None]
    step = (both_sums - tl.sum(both_sums * unit, 1)[:, None] * unit) * inverse[:, None]
    if PAPER:
        if START:
            starts = (inverse == 0) & (count > 0)
            step = tl.where(starts[:, None], sums * _inverse_norm(sums, TINY)[:, None], step)
        step += center
    tl.store(out + here, step, both)
