"""Last-arrival kernels with one mistake each, to show that the audit finds it. Never launched."""

import triton
import triton.language as tl


@triton.jit
def last_arrival(
    x_ptr, partials_ptr, arrivals_ptr, out_ptr, SEM: tl.constexpr, BARRIER: tl.constexpr, CACHE: tl.constexpr
):
    program = tl.program_id(0)
    index = tl.arange(0, 256)
    tl.store(partials_ptr + program * 256 + index, tl.load(x_ptr + program * 256 + index))
    if BARRIER:
        tl.debug_barrier()
    if tl.atomic_add(arrivals_ptr, 1, sem=SEM, scope="gpu") == tl.num_programs(0) - 1:
        total = tl.zeros((256,), tl.float32)
        for other in range(tl.num_programs(0)):
            total += tl.load(partials_ptr + other * 256 + index, cache_modifier=CACHE)
        tl.store(out_ptr + index, total)
        tl.store(arrivals_ptr, 0)


@triton.jit
def dot_of_run_time_width(x_ptr, out_ptr, width, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    x = tl.load(x_ptr + row * width + column, mask=column < width, other=0.0)
    tl.store(out_ptr + row, tl.sum(x.to(tl.float32)))


@triton.jit
def too_many_registers(x_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index)
    tl.store(out_ptr + index, x - tl.sum(x))
