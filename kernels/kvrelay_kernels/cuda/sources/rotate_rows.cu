// Rows of 16-bit elements, rotated in place: attention over rotated values, turned back. Eight elements a thread.
#include "elements.cuh"
#include "rotation.cuh"

// rows: `count` elements, whole runs of RUN.
extern "C" __global__ void __launch_bounds__(256) rotate_rows(u16* rows, long long count) {
    release_dependents();
    await_producers();
    const u64 at = 8 * ((u64)blockIdx.x * blockDim.x + threadIdx.x);
    const bool mine = at < count;
    float x[8];
    widen(x, mine ? *reinterpret_cast<const uint4*>(rows + at) : uint4{0, 0, 0, 0});
    rotate<RUN>(x, mine);
    if (mine) *reinterpret_cast<uint4*>(rows + at) = narrow(x);
}
