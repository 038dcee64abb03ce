// Blocks of any format -> blocks of 16-bit values in scratch, in the order of a list: what prefill kernels read.
// One thread block takes K or V of one block; a thread 16 or 32 elements at a time.
#include "cache_format.cuh"
#include "elements.cuh"

constexpr int rows = kv_heads * block_tokens;
constexpr int scratch_bytes = TO_BYTES;  // of a block
constexpr int threads = 256;
constexpr int batch = bits == 3 ? 32 : 16;  // elements: whole words of codes, one scale
constexpr int words = batch * bits / 32;
constexpr int chunks = rows * head_dim / batch;

// What the list says of a block in scratch.
struct Source {
    int block, tokens;  // in the arena's layer; those that are written, the rest become zeros
};

DEVICE void load_codes(u32 (&word)[words], const u8* from) {
    if constexpr (words == 4) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
        word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
    } else if constexpr (words == 2) {
        const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
        word[0] = v.x, word[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < words; i++) word[i] = __ldg(reinterpret_cast<const u32*>(from) + i);
    }
}

// The stream of bits from bit `first` on; what a word holds of it and the next one adds.
DEVICE u32 stream(const u32 (&word)[words], int first, int count) {
    const u32 low = word[first / 32] >> first % 32;
    return first % 32 + count > 32 ? low | word[first / 32 + 1] << (32 - first % 32) : low;
}

DEVICE void decode_steps(float (&x)[batch], const u32 (&word)[words], float scale, float bias) {
#pragma unroll
    for (int i = 0; i < batch; i++)
        x[i] = fmaf(float(stream(word, i * bits, bits) & ((1 << bits) - 1)), scale, bias);
}

DEVICE void decode_numbers(float (&x)[batch], const u32 (&word)[words], float scale) {
#pragma unroll
    for (int i = 0; i < batch; i += 4) {
        const u32 codes = stream(word, i * bits, 4 * bits);
        u32 pair[2];
        if constexpr (levels == Levels::e4m3) pair[0] = e4m3_halves(codes), pair[1] = e4m3_halves(codes >> 16);
        else table_halves<table_bits>(pair, codes);
        constexpr float units = levels == Levels::e4m3 ? e4m3_units : 1;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float number = k % 2 ? high_half(pair[k / 2]) : low_half(pair[k / 2]);
            x[i + k] = number * units * scale;
        }
    }
}

DEVICE void expand(u8* to, const u8* block, const Side& side, int tokens) {
    using Stored = typename StoredScale<scale_kind>::type;
    const Stored* scales = reinterpret_cast<const Stored*>(block + side.scales);
    const Stored* biases = reinterpret_cast<const Stored*>(block + side.biases);
#pragma unroll 4
    for (int n = threadIdx.x; n < chunks; n += threads) {
        const int first = n * batch, row = first / head_dim;
        const int scale_at = row * (head_dim / group) + first % head_dim / group;
        uint4* out = reinterpret_cast<uint4*>(to + (u64)first * 2);
        if (row % block_tokens >= tokens) {
#pragma unroll
            for (int i = 0; i < batch / 8; i++) out[i] = {0, 0, 0, 0};
        } else if constexpr (bits == 16) {
            const uint4* from = reinterpret_cast<const uint4*>(block + side.codes + (u64)first * 2);
#pragma unroll
            for (int i = 0; i < batch / 8; i++) out[i] = __ldg(from + i);
        } else {
            float x[batch];
            u32 word[words];
            load_codes(word, block + side.codes + (u64)first * bits / 8);
            const float scale = decode_scale<scale_kind>(__ldg(scales + scale_at));
            if constexpr (levels == Levels::steps)
                decode_steps(x, word, scale, decode_scale<scale_kind>(__ldg(biases + scale_at)));
            else
                decode_numbers(x, word, scale);
#pragma unroll
            for (int i = 0; i < batch / 8; i++) out[i] = narrow(reinterpret_cast<const float(&)[8]>(x[8 * i]));
        }
    }
}

extern "C" __global__ void __launch_bounds__(threads)
expand_blocks(const u8* layer, const Source* list, u8* scratch) {
    const Source source = list[blockIdx.x];
    const u8* from = layer + (u64)source.block * block_bytes;
    u8* to = scratch + (u64)blockIdx.x * scratch_bytes;
    if (blockIdx.y == 0)
        expand(to + TO_K, from, k_side, source.tokens);
    else
        expand(to + TO_V, from, v_side, source.tokens);
}
