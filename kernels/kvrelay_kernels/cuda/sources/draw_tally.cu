// Rows that are sampled: how many tokens lie in each bin of logits, and what they weigh together.
//
// A thread block a piece of a row. Whole numbers are added, so that the order of the atomics changes nothing.
#include "draw.cuh"

extern "C" __global__ void __launch_bounds__(threads)
draw_tally(const float* logits, const int* places, const Draw* draws, int vocabulary, int piece, const u64* firsts,
           u64* masses, u32* counts) {
    __shared__ u64 mass[bins];
    __shared__ u32 count[bins];
    release_dependents();
    const int row = blockIdx.y, place = load_fresh(places + row);
    await_producers();
    if (place < 0 || draws[place].temperature == 0) return;
    const u64 first = first_of(firsts + u64(row) * gridDim.x, gridDim.x);
    if (first == broken) return;
    each_number(0, bins, [](int i) { mass[i] = 0, count[i] = 0; });
    __syncthreads();
    const Weights weights(draws[place], first);
    const float* x = logits + u64(row) * vocabulary;
    const int begin = blockIdx.x * piece;
    each_token(x, begin, min(vocabulary, begin + piece), [&](int, float value) {
        const int bin = weights.bin(value);
        if (bin >= bins) return;
        if (const u64 weight = weights.of(value)) add_shared(mass + bin, weight), atomicAdd(count + bin, 1u);
    });
    __syncthreads();
    each_number(0, bins, [=](int i) {
        if (count[i] == 0) return;
        atomicAdd(masses + u64(row) * bins + i, mass[i]);
        atomicAdd(counts + u64(row) * bins + i, count[i]);
    });
}
