"""The two passes as Triton kernels: a program walks a row, or a block of one, and nothing is added with atomics.

Each kernel forms in its registers what the eager form keeps in rows: finished logits, exponentials, differences. Sums
are taken over the exponentials of the largest logit so far and brought to the largest of all as it is found. Figures
and factors are in the order of ``passes``.

The arguments of one kind of logits are z (the student's), w (the teacher's) or r (the reference student's), each with
pointer, stride of a row, scale and soft-cap.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finish(raw, scale, soft_cap, IS_CAPPED: tl.constexpr):
    value = raw.to(tl.float32) * scale
    if IS_CAPPED:
        # tanh by one exponential, which saturates where it must.
        value = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 * value / soft_cap) + 1.0))
    return value


@triton.jit
def add_student(z, largest, total, tempered, spread, inverse_temperature, IS_TEMPERED: tl.constexpr):
    """The student's sums with entries ``z`` (minus infinity: none) added, all by the new largest."""
    now = tl.maximum(largest, tl.max(z, axis=0))
    fall = largest - now
    above = z - now
    exps = tl.exp(above)
    spread = (spread + fall * total) * tl.exp(fall) + tl.sum(tl.where(exps > 0.0, exps * above, 0.0), axis=0)
    total = total * tl.exp(fall) + tl.sum(exps, axis=0)
    if IS_TEMPERED:
        tempered = tempered * tl.exp(fall * inverse_temperature)
        tempered += tl.sum(tl.exp(above * inverse_temperature), axis=0)
    else:
        tempered = total
    return now, total, tempered, spread


@triton.jit
def add_teacher(w, u, is_shared, largest, total, crossed):
    """The teacher's sums with entries ``w`` added where they are the student's too; ``u`` is the student's."""
    w = tl.where(is_shared, w, float("-inf"))
    now = tl.maximum(largest, tl.max(w, axis=0))
    taught = tl.exp(w - now)
    fall = tl.exp(largest - now)
    crossed = crossed * fall + tl.sum(tl.where(is_shared, taught * (w - u), 0.0), axis=0)
    return now, total * fall + tl.sum(taught, axis=0), crossed


@triton.jit
def squared_distance(z, r_row, places, is_there, r_scale, r_cap, R_CAPPED: tl.constexpr):
    r = finish(tl.load(r_row + places, mask=is_there, other=0.0), r_scale, r_cap, R_CAPPED)
    difference = tl.where(is_there, z - r, 0.0)
    return tl.sum(difference * difference, axis=0)


@triton.jit
def measure(
    z_ptr, z_stride, z_scale, z_cap, labels_ptr, vocab_size, inverse_temperature,
    w_ptr, w_stride, w_scale, w_cap, shared_size, mask_ptr,
    r_ptr, r_stride, r_scale, r_cap,
    ids_ptr, emptied_ptr, num_slots,
    out_ptr, num_rows,
    Z_CAPPED: tl.constexpr, W_CAPPED: tl.constexpr, R_CAPPED: tl.constexpr,
    HAS_TEACHER: tl.constexpr, HAS_MASK: tl.constexpr, HAS_REFERENCE: tl.constexpr, IS_TEMPERED: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_row, w_row, r_row, out = z_ptr + row * z_stride, w_ptr + row * w_stride, r_ptr + row * r_stride, out_ptr + row
    tl.store(out, finish(tl.load(z_row + tl.load(labels_ptr + row)), z_scale, z_cap, Z_CAPPED))
    nothing = float("-inf")
    least = -3.0e38  # below every logit, and finite, so that no difference with it is NaN
    if SLOTS > 0:
        # What is to be left out of the rest is minus infinity while the row is walked; all of it is added at the end.
        slots = row * num_slots + tl.arange(0, SLOTS)
        is_slot = tl.arange(0, SLOTS) < num_slots
        ids = tl.load(ids_ptr + slots, mask=is_slot, other=0)
        emptied = tl.load(emptied_ptr + slots, mask=is_slot, other=0) != 0
        held = tl.load(z_row + ids, mask=emptied, other=nothing)
        tl.debug_barrier()
        tl.store(z_row + ids, tl.full([SLOTS], nothing, tl.float32), mask=emptied)
        tl.debug_barrier()
    is_looked_at = True
    if HAS_MASK:
        is_looked_at = tl.load(mask_ptr + row) != 0
    largest, total, tempered, spread = least, 0.0, 0.0, 0.0
    w_largest, w_total, crossed, distance = least, 0.0, 0.0, 0.0
    for start in range(0, vocab_size, BLOCK):
        places = start + tl.arange(0, BLOCK)
        raw = tl.load(z_row + places, mask=places < vocab_size, other=nothing)
        z = tl.where(raw == nothing, nothing, finish(raw, z_scale, z_cap, Z_CAPPED))
        largest, total, tempered, spread = add_student(
            z, largest, total, tempered, spread, inverse_temperature, IS_TEMPERED
        )
        if HAS_TEACHER:
            is_shared = (places < shared_size) & is_looked_at
            w_raw = tl.load(w_row + places, mask=is_shared, other=0.0)
            w = finish(w_raw, w_scale, w_cap, W_CAPPED) * inverse_temperature
            w_largest, w_total, crossed = add_teacher(
                w, z * inverse_temperature, is_shared, w_largest, w_total, crossed
            )
        if HAS_REFERENCE:
            distance += squared_distance(z, r_row, places, raw != nothing, r_scale, r_cap, R_CAPPED)
    rest, before = tempered, largest
    if SLOTS > 0:
        z = tl.where(emptied, finish(held, z_scale, z_cap, Z_CAPPED), nothing)
        largest, total, tempered, spread = add_student(
            z, largest, total, tempered, spread, inverse_temperature, IS_TEMPERED
        )
        rest = rest * tl.exp((before - largest) * inverse_temperature)
        if HAS_REFERENCE:
            distance += squared_distance(z, r_row, ids, emptied, r_scale, r_cap, R_CAPPED)
        tl.debug_barrier()
        tl.store(z_row + ids, held, mask=emptied)
    store_figures(out, num_rows, largest, total, tempered, rest, w_largest, w_total, crossed, distance, spread)


@triton.jit
def store_figures(out, num_rows, largest, total, tempered, rest, w_largest, w_total, crossed, distance, spread):
    """All but the first, in their order."""
    tl.store(out + 1 * num_rows, largest)
    tl.store(out + 2 * num_rows, total)
    tl.store(out + 3 * num_rows, tempered)
    tl.store(out + 4 * num_rows, rest)
    tl.store(out + 5 * num_rows, w_largest)
    tl.store(out + 6 * num_rows, w_total)
    tl.store(out + 7 * num_rows, crossed)
    tl.store(out + 8 * num_rows, distance)
    tl.store(out + 9 * num_rows, spread)


@triton.jit
def fill(
    z_ptr, z_stride, z_scale, z_cap, labels_ptr, vocab_size, inverse_temperature,
    w_ptr, w_stride, w_scale, w_cap, shared_size, mask_ptr,
    r_ptr, r_stride, r_scale, r_cap, pull,
    figures_ptr, factors_ptr, num_rows,
    out_ptr, out_stride,
    Z_CAPPED: tl.constexpr, W_CAPPED: tl.constexpr, R_CAPPED: tl.constexpr,
    HAS_TEACHER: tl.constexpr, HAS_MASK: tl.constexpr, HAS_REFERENCE: tl.constexpr, IS_TEMPERED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = places < vocab_size
    largest = tl.load(figures_ptr + 1 * num_rows + row)
    own = tl.load(factors_ptr + 0 * num_rows + row)
    by_student = tl.load(factors_ptr + 1 * num_rows + row)
    hit = tl.load(factors_ptr + 3 * num_rows + row)
    z = finish(tl.load(z_ptr + row * z_stride + places, mask=is_there, other=0.0), z_scale, z_cap, Z_CAPPED)
    if IS_TEMPERED:
        total = own * tl.exp(z - largest) + by_student * tl.exp((z - largest) * inverse_temperature)
    else:
        total = (own + by_student) * tl.exp(z - largest)
    if HAS_TEACHER:
        is_shared = places < shared_size
        if HAS_MASK:
            is_shared = is_shared & (tl.load(mask_ptr + row) != 0)
        w_largest = tl.load(figures_ptr + 5 * num_rows + row)
        by_teacher = tl.load(factors_ptr + 2 * num_rows + row)
        w_raw = tl.load(w_ptr + row * w_stride + places, mask=is_shared, other=0.0)
        w = finish(w_raw, w_scale, w_cap, W_CAPPED) * inverse_temperature
        total -= tl.where(is_shared, by_teacher * tl.exp(w - w_largest), 0.0)
    if HAS_REFERENCE:
        r = finish(tl.load(r_ptr + row * r_stride + places, mask=is_there, other=0.0), r_scale, r_cap, R_CAPPED)
        total += pull * (z - r)
    total -= tl.where(places == tl.load(labels_ptr + row), hit, 0.0)
    total *= z_scale
    if Z_CAPPED:
        total *= 1.0 - (z / z_cap) * (z / z_cap)
    tl.store(out_ptr + row * out_stride + places, total.to(out_ptr.dtype.element_ty), mask=is_there)


@triton.jit
def place(
    out_ptr, out_stride, ids_ptr, used_ptr, values_ptr, shares_ptr, slopes_ptr, num_slots, SLOTS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = row * num_slots
    slots = tl.arange(0, SLOTS)
    is_slot = slots < num_slots
    ids = tl.load(ids_ptr + first + slots, mask=is_slot, other=-1)
    used = tl.load(used_ptr + first + slots, mask=is_slot, other=0) != 0
    total = tl.load(values_ptr + first + slots, mask=is_slot, other=0.0)
    for slot in range(num_slots):
        # A share of a slot that is not used is 0.
        total += tl.where(ids == tl.load(ids_ptr + first + slot), tl.load(shares_ptr + first + slot), 0.0)
    total *= tl.load(slopes_ptr + first + slots, mask=is_slot, other=0.0)
    # Slots of one id hold the same sum, so that it does not matter which is written last.
    tl.store(out_ptr + row * out_stride + ids, total.to(out_ptr.dtype.element_ty), mask=used)
