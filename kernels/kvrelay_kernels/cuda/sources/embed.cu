// Rows of a table, scaled, as float32: the beginning of the residual stream. One thread block a row.
#include "coded_matrix.cuh"
#include "elements.cuh"

// table: 16-bit elements row by row, or codes; factors: only of codes. ids came from the host; in place of one may stand
// ~place, where `newest` has the one that was drawn for the sequence there.
extern "C" __global__ void embed(const u8* table, const Factors* factors, const int* ids, const int* newest, float scale,
                                 int width, float* out) {
    release_dependents();
    const int id = load_fresh(ids + blockIdx.x);
    await_producers();
    const int row = id < 0 ? newest[~id] : id;
    float* to = out + (u64)blockIdx.x * width;
    for (int n = 4 * threadIdx.x; n < width; n += 4 * blockDim.x) {
        float x[4];
        if constexpr (coded) {
            CodedMatrix{table, factors, (width + unit_columns - 1) / unit_columns}.values(x, row, n);
        } else {
            const u16* from = reinterpret_cast<const u16*>(table) + (u64)row * width;
            widen(x, __ldg(reinterpret_cast<const uint2*>(from + n)));
        }
        *reinterpret_cast<float4*>(to + n) = {x[0] * scale, x[1] * scale, x[2] * scale, x[3] * scale};
    }
}
