"""The Triton kernels. `step` launches them, and says what they read and write.

A program holds whole rows of d values, or a block of columns where it sums over many rows. `ACC` is
the type of all computations, `WIDTH` the next power of two from d on. No float is added atomically:
the order of every sum depends on the shapes alone. The arguments in capitals are constants.
As in PyTorch, float64 becomes float32 before a half type.
"""

import triton
import triton.language as tl
from triton.language import constexpr

# One binary for all batch sizes, blocks of rows and rates; `grad` may be part of a larger tensor.
VARYING = ["n", "first_program", "rate"]
jit = triton.jit(do_not_specialize=[*VARYING, "grad"])


@triton.jit
def _inverse_norm(rows, TINY: constexpr):
    """Inverse norms over the last dimension; 0 where `_ops.read_norms` finds no direction."""
    norm = tl.sqrt(tl.sum(rows * rows, -1))
    return 1 / tl.where((norm > TINY) & (norm < float("inf")), norm, float("inf"))


@triton.jit
def _clamp(value, least, most):
    """Clamps; NaN stays NaN."""
    return tl.where(value < least, least, tl.where(value > most, most, value))


@triton.jit
def _labels(target, sample, n, c, ignore_index):
    """Labels of samples, 0 where out of range; which samples count; which of these have a class."""
    label = tl.load(target + sample, sample < n, other=0).to(tl.int64)
    counted = (sample < n) & (label != ignore_index)
    valid = counted & (label >= 0) & (label < c)
    return tl.where(valid, label, 0), counted, valid


@triton.jit
def _add_rows(first, num_rows, columns, d, ROWS: constexpr, ACC: constexpr):
    """The sum of rows of d values, ROWS at a time."""
    added = tl.zeros((ROWS, columns.shape[0]), ACC)
    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        both = (row < num_rows) & (columns < d)[None, :]
        added += tl.load(first + row.to(tl.int64) * d + columns[None, :], both, other=0)
    return tl.sum(added, 0)


@jit
def read(
    features, target, centers, weight, units, rows, cosines, inverses, of_classes, partial,
    c, d, ignore_index, blocks, each, n, first_program,
    SIMPLEX: constexpr, WEIGHTED: constexpr, TINY: constexpr, ACC: constexpr, ROWS: constexpr,
    WIDTH: constexpr,
):  # fmt: skip
    """Reads a block of centers (programs up to `blocks`) or a sample (the others)."""
    program, columns = tl.program_id(0) + first_program, tl.arange(0, WIDTH)
    inside = columns < d
    if program < blocks:
        total, weighted = tl.zeros((ROWS, WIDTH), ACC), tl.zeros((ROWS, WIDTH), ACC)
        nonzero, weights = tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC)
        first = program.to(tl.int64) * each
        last = tl.minimum(first + each, c)
        for start in range(first, last, ROWS):
            row = start + tl.arange(0, ROWS).to(tl.int64)
            mask = row < last
            both = mask[:, None] & inside[None, :]
            here = row[:, None] * d + columns[None, :]
            unit = tl.load(centers + here, both, other=0.0).to(ACC)
            inverse = _inverse_norm(unit, TINY)
            unit = tl.where((inverse != 0)[:, None], unit * inverse[:, None], 0.0)
            if SIMPLEX:
                tl.store(units + (here - first_program.to(tl.int64) * each * d), unit, both)
            tl.store(of_classes + row, inverse, mask)
            tl.store(of_classes + c + row, tl.zeros((ROWS,), ACC), mask)
            own = tl.load(weight + row, mask, other=0.0).to(ACC) if WEIGHTED else mask.to(ACC)
            total += unit
            weighted += unit * own[:, None]
            nonzero += tl.where(inverse != 0, 1.0, 0.0)
            weights += own
        into = partial + program * (2 * d + 2)
        tl.store(into + columns, tl.sum(total, 0), inside)
        tl.store(into + d + columns, tl.sum(weighted, 0), inside)
        tl.store(into + 2 * d, tl.sum(nonzero, 0))
        tl.store(into + 2 * d + 1, tl.sum(weights, 0))
    else:
        sample = (program - blocks).to(tl.int64)
        label, _, valid = _labels(target, sample, n, c, ignore_index)
        mask = columns < tl.where(valid, d, 0)
        x = tl.load(features + sample * d + columns, mask, other=0.0).to(ACC)
        center = tl.load(centers + label * d + columns, mask, other=0.0).to(ACC)
        own, inverse = _inverse_norm(center, TINY), _inverse_norm(x, TINY)
        center = tl.where(own != 0, center * own, 0.0)
        cosine = _clamp(tl.sum(x * inverse * center, 0), -1.0, 1.0)
        # Eq. 8 takes the samples with a cosine: that of others is 2, or NaN if they are not finite.
        tl.store(cosines + sample, tl.where(valid, cosine, 2.0))
        tl.store(inverses + sample, inverse)
        if WEIGHTED:
            center *= tl.load(weight + label, valid, other=0.0).to(ACC)
        tl.store(rows + sample * d + columns, center, inside)


@jit
def sums(
    features, target, gram, cosines, inverses, of_classes, partial, total, squares, slots, in_tiles,
    c, d, blocks, gram_size, column_blocks, n,
    ACC: constexpr, TILE: constexpr, COLUMNS: constexpr, SQUARES: constexpr,
):  # fmt: skip
    """Adds up columns of `partial`, or of a tile of samples by class; or squares of G."""
    program, index = tl.program_id(0), tl.arange(0, TILE)
    columns = (program % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    inside, tile, tiles = columns < d, program // column_blocks - 3, tl.cdiv(n, TILE)
    if tile < 0:  # the 2 d + 2 columns of `partial` are at most three times as many blocks
        columns = program * COLUMNS + tl.arange(0, COLUMNS)
        value = _add_rows(partial, blocks, columns, 2 * d + 2, 2 * TILE, ACC)
        tl.store(total + columns, value, columns < 2 * d + 2)
    elif tile < tiles:
        sample = tile * TILE + index
        label = tl.load(target + sample, sample < n, other=0).to(tl.int64)
        valid = tl.abs(tl.load(cosines + sample, sample < n, other=2)) <= 1
        # The sum of a class takes the place of its first sample in the tile.
        same = (label[:, None] == label[None, :]) & valid[None, :]
        first = valid & (tl.min(tl.where(same, index[None, :], TILE), 1) == index)
        here = sample.to(tl.int64)[:, None] * d + columns[None, :]
        x = tl.load(features + here, valid[:, None] & inside[None, :], other=0.0).to(ACC)
        x *= tl.load(inverses + sample, valid, other=0)[:, None]
        if ACC == tl.float32:
            # Zeros and ones are exact in TF32, and three parts of x hold nearly all of it.
            added = tl.dot(same.to(ACC), x, input_precision="tf32x3", out_dtype=ACC)
        else:  # products in float64 do not compile before Triton 3.7
            added = tl.sum(tl.where(same[:, :, None], x[None, :, :], 0.0), 1)
        tl.store(slots + here, added, first[:, None] & inside[None, :])
        tl.store(in_tiles + tile * d + columns, tl.sum(x, 0), inside)
        tl.store(of_classes + c + label, tl.full((TILE,), 1, ACC), valid)
    else:
        square = program - column_blocks * (3 + tiles)
        place = square.to(tl.int64) * SQUARES + tl.arange(0, SQUARES)
        value = tl.load(gram + place, place < gram_size, other=0)
        tl.store(squares + square, tl.sum(value * value, 0))


@jit
def finish(
    target, weight, cosines, total, squares, in_tiles, everyone, loss, terms, scalars,
    c, d, ignore_index, num_squares, n,
    SIMPLEX: constexpr, WEIGHTED: constexpr, E: constexpr, TILE: constexpr, CHUNK: constexpr,
    BATCH: constexpr, ACC: constexpr, WIDTH: constexpr,
):  # fmt: skip
    """In one program: Eq. 3 or the simplex form, the mean of Eq. 2, their sum."""
    columns, batch = tl.arange(0, WIDTH), tl.arange(0, BATCH)
    inside, classes = columns < d, c.to(ACC)
    nonzero, mean_weight = tl.load(total + 2 * d), tl.load(total + 2 * d + 1) / classes
    whole = tl.load(total + columns, inside, other=0)
    along = tl.sum(whole * whole, 0) - nonzero
    if SIMPLEX:  # classes without a center do not count
        others = tl.maximum(nonzero - 1, 0)
        a, scale = 1 / tl.maximum(others, 1), others / tl.maximum(nonzero * nonzero * nonzero, 1)
        square = tl.sum(_add_rows(squares, num_squares, tl.arange(0, 1), 1, BATCH, ACC), 0)
        inter = square - nonzero + 2 * a * along + a * a * nonzero * (nonzero - 1)
        inter = _clamp(inter * scale, 0.0, 1.0)
    else:
        a, scale = 1 / (classes - 1), 1 / (4 * classes * (classes - 1))
        inter = 0.5 + along / (2 * classes * (classes - 1))
        inter = _clamp(inter, (classes - 2) / (2 * (classes - 1)), 1.0)
    parts, weights = tl.zeros((BATCH,), ACC), tl.zeros((BATCH,), ACC)
    finite, wrong = tl.zeros((BATCH,), tl.int32), tl.zeros((BATCH,), tl.int32)
    for start in range(0, n, BATCH):
        label, counted, valid = _labels(target, start + batch, n, c, ignore_index)
        cosine = tl.load(cosines + start + batch, counted, other=2)
        own = tl.load(weight + label, valid, other=0.0).to(ACC) if WEIGHTED else valid.to(ACC)
        share = (1 - E) * own + E * mean_weight
        weights += tl.where(counted, share, 0.0)
        parts += tl.where(counted, share - (1 - E) * own * cosine, 0.0)
        finite += (tl.abs(cosine) <= 1).to(tl.int32)
        wrong += (counted & ~valid).to(tl.int32)
    part, weight_sum = tl.sum(parts, 0), tl.sum(weights, 0)
    if E > 0:  # samples that are not finite are not in this sum, but show in the cosines
        sample_sum = _add_rows(in_tiles, tl.cdiv(n, TILE), columns, d, CHUNK, ACC)
        tl.store(everyone + columns, sample_sum, inside)
        part -= E / classes * tl.sum(sample_sum * tl.load(total + d + columns, inside, other=0), 0)
    share = 1 / tl.where(weight_sum == 0, 1, weight_sum)
    intra = _clamp(0.5 * part * share, 0.0, 1.0)
    tl.store(loss, intra + inter)
    tl.store(terms, intra)
    tl.store(terms + 1, inter)
    tl.store(scalars, (tl.sum(wrong, 0) == 0).to(ACC))  # all labels are in range
    tl.store(scalars + 1, share)
    tl.store(scalars + 2, tl.maximum(tl.sum(finite, 0), 1).to(ACC))  # m of Eq. 6
    tl.store(scalars + 3, nonzero)
    tl.store(scalars + 4, intra * 0)  # NaN if the loss is
    tl.store(scalars + 5, a)
    tl.store(scalars + 6, scale)


@jit
def move(
    grad, target, centers, out, weight, product, cosines, of_classes, total, slots, everyone,
    scalars, c, d, n, first_program, rate: tl.float64,
    GRADIENT: constexpr, PER_SAMPLE: constexpr, START: constexpr, SIMPLEX: constexpr,
    WEIGHTED: constexpr, E: constexpr, TILE: constexpr, TILES: constexpr, TINY: constexpr,
    ACC: constexpr, ROWS: constexpr, WIDTH: constexpr,
):  # fmt: skip
    """Eq. 8 for a few centers, or their gradient."""
    earlier, columns = first_program.to(tl.int64) * ROWS, tl.arange(0, WIDTH)
    row = earlier + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask, inside = row < c, columns < d
    both = mask[:, None] & inside[None, :]
    here = row[:, None] * d + columns[None, :]
    inverse = tl.load(of_classes + row, mask, other=0)
    # The sums of unit features and the numbers of samples, from the tiles with samples of a class.
    added, count = tl.zeros((ROWS, WIDTH), ACC), tl.zeros((ROWS,), ACC)
    present = tl.load(of_classes + c + row, mask, other=0) > 0
    for _class in range(tl.sum(present.to(tl.int32), 0)):
        label = tl.min(tl.where(present, row, c), 0)
        own = row == label
        present = present & ~own
        for start in range(0, tl.cdiv(n, TILE), TILES):
            tile = start + tl.arange(0, TILES)[:, None]
            sample = tile * TILE + tl.arange(0, TILE)[None, :]
            hit = tl.abs(tl.load(cosines + sample, sample < n, other=2)) <= 1
            hit = hit & (tl.load(target + sample, sample < n, other=0).to(tl.int64) == label)
            slot = tl.min(tl.where(hit, sample, n), 1)[:, None]
            value = slots + slot.to(tl.int64) * d + columns[None, :]
            value = tl.load(value, (slot < n) & inside[None, :], other=0)
            added += tl.where(own[:, None], tl.sum(value, 0)[None, :], 0.0)
            count += tl.where(own, tl.sum(tl.sum(hit.to(ACC), 1), 0), 0.0)
    center = tl.load(centers + here, both, other=0.0).to(ACC)
    unit = tl.where((inverse != 0)[:, None], center * inverse[:, None], 0.0)
    a, scale = tl.load(scalars + 5), tl.load(scalars + 6)
    if GRADIENT:
        alpha, pull = -2 * tl.load(grad), added
        if E > 0:
            all_samples = tl.load(everyone + columns, inside, other=0)[None, :]
            pull = (1 - E) * added + E / c.to(ACC) * all_samples
        weights = tl.load(weight + row, mask, other=0.0).to(ACC) if WEIGHTED else mask.to(ACC)
        pull *= (0.25 * alpha * tl.load(scalars + 1) * weights)[:, None]
    else:
        m, alpha = tl.load(scalars + 2), (tl.full((), 1, ACC) * rate).to(ACC)
        if PER_SAMPLE:
            alpha = tl.minimum(alpha * m, 4 / a)
        pull = added * (0.5 * alpha / m / (1 + count))[:, None]
    push = tl.load(total + columns, inside, other=0)[None, :]
    if SIMPLEX:
        push = a * push + tl.load(product + (here - earlier * d), both, other=0)
    step = pull - 2 * alpha * scale * push
    # The derivative of normalising a center.
    step = (step - tl.sum(step * unit, 1)[:, None] * unit) * inverse[:, None]
    if GRADIENT:
        step += tl.load(scalars + 4)
    elif START:
        begun = added * _inverse_norm(added, TINY)[:, None]
        step = tl.where((inverse == 0)[:, None], begun, center + step)
    else:
        step += center
    half: constexpr = out.dtype.element_ty.primitive_bitwidth == 16
    tl.store(out + here, step.to(tl.float32 if half else ACC), both)


@jit
def gradient(
    grad, features, target, rows, total, scalars, out, c, d, ignore_index, n,
    SIMPLEX: constexpr, E: constexpr, TINY: constexpr, ACC: constexpr, WIDTH: constexpr,
):  # fmt: skip
    """For each sample, Eq. 5 times the gradient of the loss; in the simplex form times the norm."""
    sample, columns = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    here, inside = sample * d + columns, columns < d
    _, _, valid = _labels(target, sample, n, c, ignore_index)
    unit = tl.load(features + here, columns < tl.where(valid, d, 0), other=0.0).to(ACC)
    inverse = _inverse_norm(unit, TINY)
    unit *= inverse
    center = tl.load(rows + here, inside, other=0)
    if E > 0:
        center = (1 - E) * center + E / c.to(ACC) * tl.load(total + d + columns, inside, other=0)
    factor = -0.5 * tl.load(grad) * tl.load(scalars + 1)
    factor *= tl.where(valid & (inverse != 0), 1.0 if SIMPLEX else inverse, 0.0)
    value = factor * (center - tl.sum(center * unit, 0) * unit)
    half: constexpr = out.dtype.element_ty.primitive_bitwidth == 16
    tl.store(out + here, value.to(tl.float32 if half else ACC), inside)
