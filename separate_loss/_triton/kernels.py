"""The Triton kernels. `step` launches them, and says what they read and write.

A program holds whole rows of d values, or a block of columns where it sums over many rows. `ACC` is
the type of all computations, `WIDTH` the next power of two from d on. No float is added atomically:
the order of every sum depends on the shapes alone. The arguments in capitals are constants.
"""

import triton
import triton.language as tl
from triton.language import constexpr

# One binary for all batch sizes, blocks of rows and rates; `grad` may be part of a larger tensor.
VARYING = ["n", "tiles", "first_program", "rate"]
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
def _add_rows(first, num_rows, stride, columns, d, ROWS: constexpr, ACC: constexpr):
    """The sum of rows that are `stride` values apart, ROWS at a time."""
    added = tl.zeros((ROWS, columns.shape[0]), ACC)
    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        both = (row < num_rows) & (columns < d)[None, :]
        added += tl.load(first + row.to(tl.int64) * stride + columns[None, :], both, other=0)
    return tl.sum(added, 0)


@triton.jit
def _store(pointer, value, mask, ACC: constexpr):
    """Stores; float64 becomes float32 before a half type, as in PyTorch."""
    half: constexpr = pointer.dtype.element_ty.primitive_bitwidth == 16
    tl.store(pointer, value.to(tl.float32 if half else ACC), mask)


@jit
def read(
    features, target, centers, weight, units, rows, cosines, inverses, of_classes, partial, numbers,
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
        into = units - first_program.to(tl.int64) * each * d
        for start in range(first, last, ROWS):
            row = start + tl.arange(0, ROWS).to(tl.int64)
            mask = row < last
            both = mask[:, None] & inside[None, :]
            here = row[:, None] * d + columns[None, :]
            unit = tl.load(centers + here, both, other=0.0).to(ACC)
            inverse = _inverse_norm(unit, TINY)
            unit = tl.where((inverse != 0)[:, None], unit * inverse[:, None], 0.0)
            if SIMPLEX:
                tl.store(into + here, unit, both)
            tl.store(of_classes + row, inverse, mask)
            tl.store(of_classes + c.to(tl.int64) + row, tl.zeros((ROWS,), ACC), mask)
            own = tl.load(weight + row, mask, other=0.0).to(ACC) if WEIGHTED else mask.to(ACC)
            total += unit
            weighted += unit * own[:, None]
            nonzero += tl.where(inverse != 0, 1.0, 0.0)
            weights += own
        tl.store(partial + program * d + columns, tl.sum(total, 0), inside)
        tl.store(partial + (blocks + program) * d + columns, tl.sum(weighted, 0), inside)
        tl.store(numbers + program, tl.sum(nonzero, 0))
        tl.store(numbers + blocks + program, tl.sum(weights, 0))
    else:
        sample = (program - blocks).to(tl.int64)
        label, _, valid = _labels(target, sample, n, c, ignore_index)
        mask = columns < tl.where(valid, d, 0)
        x = tl.load(features + sample * d + columns, mask, other=0.0).to(ACC)
        center = tl.load(centers + label * d + columns, mask, other=0.0).to(ACC)
        own = _inverse_norm(center, TINY)
        center = tl.where(own != 0, center * own, 0.0)
        inverse = _inverse_norm(x, TINY)
        tl.store(cosines + sample, _clamp(tl.sum(x * inverse * center, 0), -1.0, 1.0))
        tl.store(inverses + sample, inverse)
        if WEIGHTED:
            center *= tl.load(weight + label, valid, other=0.0).to(ACC)
        tl.store(rows + sample * d + columns, center, inside)


@jit
def sums(
    features, target, gram, cosines, inverses, of_classes, partial, total, squares, slots, counts,
    in_tiles, c, d, ignore_index, blocks, gram_size, column_blocks, n, tiles,
    FEW: constexpr, ACC: constexpr, TILE: constexpr, COLUMNS: constexpr, SQUARES: constexpr,
):  # fmt: skip
    """Adds up a block of columns of s and s_w, or of a tile of samples by class; squares of G."""
    program, index = tl.program_id(0), tl.arange(0, TILE)
    columns = (program % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    if program < column_blocks:
        for which in tl.static_range(2):
            value = _add_rows(partial + which * blocks * d, blocks, d, columns, d, 2 * TILE, ACC)
            tl.store(total + which * d + columns, value, columns < d)
    elif program >= column_blocks * (1 + tiles):
        square = program - column_blocks * (1 + tiles)
        here = square.to(tl.int64) * SQUARES + tl.arange(0, SQUARES)
        value = tl.load(gram + here, here < gram_size, other=0)
        tl.store(squares + square, tl.sum(value * value, 0))
    else:
        tile = program // column_blocks - 1
        sample = tile * TILE + index
        label, _, valid = _labels(target, sample, n, c, ignore_index)
        # Eq. 8 ignores samples that are not finite: their cosines are NaN.
        valid = valid & (tl.abs(tl.load(cosines + sample, valid, other=0)) <= 1)
        # A slot of the tile is a class if all classes fit (FEW), else the first sample of a class.
        slot = index.to(tl.int64) if FEW else label
        same = (slot[:, None] == label[None, :]) & valid[None, :]
        if not FEW:
            first = tl.min(tl.where(same, index[None, :], TILE), 1) == index
            same = same & (valid & first)[:, None]
        x = features + sample.to(tl.int64)[:, None] * d + columns[None, :]
        x = tl.load(x, valid[:, None] & (columns < d)[None, :], other=0.0).to(ACC)
        x *= tl.load(inverses + sample, valid, other=0)[:, None]
        if ACC == tl.float32:
            # Zeros and ones are exact in TF32, and three parts of x hold nearly all of it.
            added = tl.dot(same.to(ACC), x, input_precision="tf32x3", out_dtype=ACC)
        else:  # products in float64 do not compile before Triton 3.7
            added = tl.zeros((TILE, COLUMNS), ACC)
            for i in range(tl.minimum(TILE, n - tile * TILE)):
                has = tl.max((same & (index == i)[None, :]).to(tl.int32), 1) > 0
                value = tl.sum(tl.where((index == i)[:, None], x, 0.0), 0)
                added += tl.where(has[:, None], value[None, :], 0.0)
        number = tl.sum(same.to(ACC), 1)
        used = (index < c if FEW else number > 0)[:, None] & (columns < d)[None, :]
        tl.store(slots + sample.to(tl.int64)[:, None] * d + columns[None, :], added, used)
        tl.store(in_tiles + tile * d + columns, tl.sum(x, 0), columns < d)
        if program % column_blocks == 0:
            tl.store(counts + sample, number)
            tl.store(of_classes + c.to(tl.int64) + label, tl.full((TILE,), 1, ACC), valid)


@jit
def finish(
    target, weight, cosines, numbers, total, squares, in_tiles, everyone, loss, terms, scalars,
    c, d, ignore_index, blocks, num_squares, n, tiles,
    SIMPLEX: constexpr, WEIGHTED: constexpr, E: constexpr, CHUNK: constexpr, BATCH: constexpr,
    ACC: constexpr, WIDTH: constexpr,
):  # fmt: skip
    """In one program: Eq. 3 or the simplex form, the mean of Eq. 2, their sum."""
    columns, batch = tl.arange(0, WIDTH), tl.arange(0, BATCH)
    inside, classes = columns < d, c.to(ACC)
    nonzero = tl.sum(tl.load(numbers + batch, batch < blocks, other=0), 0)
    whole = tl.load(total + columns, inside, other=0)
    along = tl.sum(whole * whole, 0) - nonzero
    if SIMPLEX:
        square = tl.zeros((BATCH,), ACC)
        for start in range(0, num_squares, BATCH):
            square += tl.load(squares + start + batch, start + batch < num_squares, other=0)
        a = 1 / tl.maximum(nonzero - 1, 1)
        inter = tl.sum(square, 0) - nonzero + 2 * a * along + a * a * nonzero * (nonzero - 1)
        inter = inter * (nonzero - 1) / (nonzero * nonzero * nonzero)
        inter = tl.where(nonzero < 2, 0.0, _clamp(inter, 0.0, 1.0))
    else:
        inter = 0.5 + along / (2 * classes * (classes - 1))
        inter = _clamp(inter, (classes - 2) / (2 * (classes - 1)), 1.0)
    mean_weight = tl.sum(tl.load(numbers + blocks + batch, batch < blocks, other=0), 0) / classes
    parts, weights = tl.zeros((BATCH,), ACC), tl.zeros((BATCH,), ACC)
    finite, wrong = tl.zeros((BATCH,), tl.int32), tl.zeros((BATCH,), tl.int32)
    for start in range(0, n, BATCH):
        sample = start + batch
        label, counted, valid = _labels(target, sample, n, c, ignore_index)
        cosine = tl.load(cosines + sample, counted, other=0)
        own = tl.load(weight + label, valid, other=0.0).to(ACC) if WEIGHTED else valid.to(ACC)
        share = (1 - E) * own + E * mean_weight
        weights += tl.where(counted, share, 0.0)
        parts += tl.where(counted, share - (1 - E) * own * cosine, 0.0)
        finite += (counted & (tl.abs(cosine) <= 1)).to(tl.int32)
        wrong += (counted & ~valid).to(tl.int32)
    part = tl.sum(parts, 0)
    if E > 0:  # samples that are not finite are not in this sum, but show in the cosines
        sample_sum = _add_rows(in_tiles, tiles, d, columns, d, CHUNK, ACC)
        tl.store(everyone + columns, sample_sum, inside)
        part -= E / classes * tl.sum(sample_sum * tl.load(total + d + columns, inside, other=0), 0)
    weight_sum = tl.sum(weights, 0)
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


@jit
def move(
    grad, target, centers, out, weight, product, of_classes, total, slots, counts, everyone,
    scalars, c, d, n, tiles, first_program, rate: tl.float64,
    GRADIENT: constexpr, PER_SAMPLE: constexpr, START: constexpr, SIMPLEX: constexpr,
    WEIGHTED: constexpr, E: constexpr, FEW: constexpr, TILE: constexpr, CHUNK: constexpr,
    TINY: constexpr, ACC: constexpr, ROWS: constexpr, WIDTH: constexpr,
):  # fmt: skip
    """Eq. 8 for a few centers, or their gradient."""
    first = (tl.program_id(0) + first_program).to(tl.int64) * ROWS
    row, columns = first + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mask, inside = row < c, columns < d
    both = mask[:, None] & inside[None, :]
    here = row[:, None] * d + columns[None, :]
    inverse = tl.load(of_classes + row, mask, other=0)
    added, count = tl.zeros((ROWS, WIDTH), ACC), tl.zeros((ROWS,), ACC)
    if tl.max(tl.load(of_classes + c.to(tl.int64) + row, mask, other=0), 0) > 0:
        if FEW:  # ROWS is 1, and the class has the same slot in each tile
            added += _add_rows(slots + first * d, tiles, TILE * d, columns, d, CHUNK, ACC)[None, :]
            number = _add_rows(counts + first, tiles, TILE, tl.arange(0, 1), 1, TILE, ACC)
            count += tl.sum(number, 0)
        else:
            for start in range(0, n, TILE):
                slot = start + tl.arange(0, TILE)
                label = tl.load(target + slot, slot < n, other=0).to(tl.int64)
                number = tl.load(counts + slot)
                hit = (number > 0) & (label >= first) & (label < first + ROWS)
                for _hit in range(tl.sum(hit.to(tl.int32), 0)):
                    one = tl.min(tl.where(hit, slot, 2147483647), 0)
                    own = row == tl.sum(tl.where(slot == one, label, 0), 0)
                    value = tl.load(slots + one.to(tl.int64) * d + columns, inside, other=0)
                    added += tl.where(own[:, None], value[None, :], 0.0)
                    count += tl.where(own, tl.sum(tl.where(slot == one, number, 0.0), 0), 0.0)
                    hit = hit & (slot != one)
    center = tl.load(centers + here, both, other=0.0).to(ACC)
    unit = tl.where((inverse != 0)[:, None], center * inverse[:, None], 0.0)
    # In the simplex form, classes without a center do not count.
    classes = tl.load(scalars + 3) if SIMPLEX else c.to(ACC)
    others = tl.maximum(classes - 1, 0)
    if GRADIENT:
        alpha = -2 * tl.load(grad)
        pull = added
        if E > 0:
            all_samples = tl.load(everyone + columns, inside, other=0)[None, :]
            pull = (1 - E) * added + E / c.to(ACC) * all_samples
        own = tl.load(weight + row, mask, other=0.0).to(ACC) if WEIGHTED else mask.to(ACC)
        pull *= (0.25 * alpha * tl.load(scalars + 1) * own)[:, None]
    else:
        m = tl.load(scalars + 2)
        alpha = (tl.full((), 1, ACC) * rate).to(ACC)
        if PER_SAMPLE:
            alpha = tl.minimum(alpha * m, 4 * tl.maximum(others, 1))
        pull = added * (0.5 * alpha / m / (1 + count))[:, None]
    push = tl.load(total + columns, inside, other=0)[None, :]
    if SIMPLEX:
        within = (row - first_program.to(tl.int64) * ROWS)[:, None] * d + columns[None, :]
        push = push / tl.maximum(others, 1) + tl.load(product + within, both, other=0)
        classes = tl.maximum(classes, 1)
        push *= -2 * alpha * others / (classes * classes * classes)
    else:
        push *= -alpha / (2 * classes * others)
    step = push + pull
    # The derivative of normalising a center.
    step = (step - tl.sum(step * unit, 1)[:, None] * unit) * inverse[:, None]
    if GRADIENT:
        step += tl.load(scalars + 4)
    elif START:
        begun = added * _inverse_norm(added, TINY)[:, None]
        step = tl.where((inverse == 0)[:, None], begun, center + step)
    else:
        step += center
    _store(out + here, step, both, ACC)


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
    _store(out + here, factor * (center - tl.sum(center * unit, 0) * unit), inside, ACC)
