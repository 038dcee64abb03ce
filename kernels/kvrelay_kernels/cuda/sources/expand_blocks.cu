// Blocks of any format -> blocks of 16-bit values in scratch, in the order of a list: what prefill kernels read.
// One thread block takes K or V of one block; a thread 16 elements at a time.
#include "elements.cuh"

constexpr int bits = BITS;    // of an element: 16 (no code, copied as it is), 8 or 4
constexpr int head_dim = HEAD_DIM;
constexpr int group = GROUP;  // elements that share a scale
constexpr int rows = KV_HEADS * 64;
constexpr int from_bytes = FROM_BYTES, to_bytes = TO_BYTES;  // of a block
constexpr int threads = 256;
constexpr int batch = 16;  // elements
constexpr int chunks = rows * head_dim / batch;

// What the list says of a block in scratch.
struct Source {
    int block, tokens;  // in the arena's layer; those that are written, the rest become zeros
};

DEVICE void load_codes(u32 (&words)[batch * bits / 32], const u8* from) {
    if constexpr (bits == 8) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else {
        const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
        words[0] = v.x, words[1] = v.y;
    }
}

DEVICE void expand(u8* to, const u8* codes, const u16* scales, const u16* biases, int tokens) {
    constexpr int per_word = 32 / bits;
#pragma unroll 4
    for (int n = threadIdx.x; n < chunks; n += threads) {
        const int first = n * batch, row = first / head_dim, scale_at = row * (head_dim / group) + first % head_dim / group;
        uint4* out = reinterpret_cast<uint4*>(to + (u64)first * 2);
        if (row % 64 >= tokens) {
            out[0] = out[1] = {0, 0, 0, 0};
        } else if constexpr (bits == 16) {
            const uint4* from = reinterpret_cast<const uint4*>(codes + (u64)first * 2);
            out[0] = __ldg(from);
            out[1] = __ldg(from + 1);
        } else {
            float x[2][8];
            u32 words[batch * bits / 32];
            load_codes(words, codes + (u64)first * bits / 8);
            const float scale = from_half(__ldg(scales + scale_at)), bias = from_half(__ldg(biases + scale_at));
#pragma unroll
            for (int i = 0; i < batch; i++) {
                const u32 code = words[i / per_word] >> i % per_word * bits & ((1 << bits) - 1);
                x[i / 8][i % 8] = fmaf(float(code), scale, bias);
            }
            out[0] = narrow(x[0]);
            out[1] = narrow(x[1]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(threads)
expand_blocks(const u8* layer, const Source* list, u8* scratch) {
    const Source source = list[blockIdx.x];
    const u8* from = layer + (u64)source.block * from_bytes;
    u8* to = scratch + (u64)blockIdx.x * to_bytes;
    if (blockIdx.y == 0) {
        expand(to + TO_K, from + K_CODES, reinterpret_cast<const u16*>(from + K_SCALES),
               reinterpret_cast<const u16*>(from + K_BIASES), source.tokens);
    } else {
        expand(to + TO_V, from + V_CODES, reinterpret_cast<const u16*>(from + V_SCALES),
               reinterpret_cast<const u16*>(from + V_BIASES), source.tokens);
    }
}
