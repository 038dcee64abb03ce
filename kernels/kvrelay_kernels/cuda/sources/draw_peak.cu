// Logits -> the likeliest token of each piece of each row, once penalties are in them and what may not come is masked.
//
// A thread block a piece of a row. Rows whose tokens are counted are written back as they are adjusted, for whoever
// draws from all of the row; the bins that `draw_tally` adds to are cleared.
#include "draw.cuh"

__noinline__ __device__ float adjusted(float x, u32 seen, const Draw& draw, bool may_end) {
    if (!may_end && seen & ends_answer) return -infinity();
    const u32 times = seen & answer_times;
    if (seen & in_prompt || times) x = x > 0 ? __fdiv_rn(x, draw.repetition) : __fmul_rn(x, draw.repetition);
    if (times) x = __fsub_rn(x, __double2float_rn(__dadd_rn(__dmul_rn(draw.frequency, times), draw.presence)));
    return x;
}

// grid: pieces, rows; `seen` has rows of `stride` words, one a place.
extern "C" __global__ void __launch_bounds__(threads)
draw_peak(float* logits, const int* places, const int* lengths, const Draw* draws, const u32* seen, int vocabulary,
          int stride, int piece, u64* firsts, u64* masses, u32* counts) {
    __shared__ u64 shared[threads / 32];
    release_dependents();
    const int row = blockIdx.y, place = load_fresh(places + row);
    await_producers();
    if (place < 0) return;
    const u64 bin_row = u64(row) * bins;
    for (int i = blockIdx.x * threads + threadIdx.x; i < bins; i += gridDim.x * threads)
        masses[bin_row + i] = 0, counts[bin_row + i] = 0;
    const Draw& draw = draws[place];
    const bool counted = draw.counted, may_end = lengths[row] >= draw.ending_from;
    float* x = logits + u64(row) * vocabulary;
    const u32* words = seen + u64(place) * stride;
    const int begin = blockIdx.x * piece, end = min(vocabulary, begin + piece);
    u64 first = 0;
    each_token(x, begin, end, [&](int token, float value) {
        // What is infinite or no number has all bits of its exponent.
        const bool finite = (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u;
        if (counted) x[token] = value = adjusted(value, words[token], draw, may_end);
        first = max(first, finite ? order_of(value, token) : broken);
    });
    first = first_of_lanes(first);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = first;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    first = first_of(shared, threads / 32);
    if (threadIdx.x == 0) firsts[u64(row) * gridDim.x + blockIdx.x] = first;
}
