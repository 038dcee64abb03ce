// What threads do together: barriers, shuffles, votes, and the instructions of a warp on matrices.
#pragma once
#include "shared_memory.h"

template <class T>
static T read_as(const void* from) {
    T to;
    return std::memcpy(&to, from, sizeof to), to;
}

static void __syncthreads() {
    static const char instruction = 0;
    host::wait_at(host::block, blockDim.x, &instruction);
}
static void __syncwarp() {
    static const char instruction = 0;
    host::wait_at(host::warps[threadIdx.x / 32].barrier, 32, &instruction);
}

// Each lane takes the value of the lane it names; a name outside the warp is its own.
template <class T>
static T from_lane(T x, int lane) {
    struct Given {
        T x;
        int lane;
    };
    return host::together<T>(Given{x, lane < 0 || lane > 31 ? threadIdx.x % 32 : lane}, [](const Given* given, T* found) {
        for (int l = 0; l < 32; l++) found[l] = given[given[l].lane].x;
    });
}
template <class T>
static T __shfl_sync(u32, T x, int lane) { return from_lane(x, lane & 31); }
template <class T>
static T __shfl_xor_sync(u32, T x, int mask) { return from_lane(x, threadIdx.x % 32 ^ mask); }
template <class T>
static T __shfl_up_sync(u32, T x, int distance) { return from_lane(x, threadIdx.x % 32 - distance); }
template <class T>
static T __shfl_down_sync(u32, T x, int distance) { return from_lane(x, threadIdx.x % 32 + distance); }
static u32 __ballot_sync(u32, bool x) {
    return host::together<u32>(x, [](const bool* given, u32* found) {
        u32 votes = 0;
        for (int l = 0; l < 32; l++) votes |= u32(given[l]) << l;
        std::fill(found, found + 32, votes);
    });
}
static bool __any_sync(u32, bool x) { return __ballot_sync(every_lane, x) != 0; }
static bool __all_sync(u32, bool x) { return __ballot_sync(every_lane, x) == every_lane; }
static int __popc(u32 x) { return __builtin_popcount(x); }

namespace host {
template <int count>
struct Words {
    u32 word[count];
};
// Matrix i is the 8 rows whose addresses lanes 8i to 8i + 7 give.
template <bool transposed, int count>
static void load(u32 (&r)[count], u32 row) {
    const auto found = together<Words<count>>(row, [](const u32* given, Words<count>* found) {
        for (int i = 0; i < count; i++) {
            u16 unit[8][8];
            for (int n = 0; n < 8; n++) std::memcpy(unit[n], at_shared(given[8 * i + n], 16, 16), 16);
            for (int l = 0; l < 32; l++) {
                const int g = l / 4, t = l % 4 * 2;
                const u32 low = transposed ? unit[t][g] : unit[g][t], high = transposed ? unit[t + 1][g] : unit[g][t + 1];
                found[l].word[i] = low | high << 16;
            }
        }
    });
    std::memcpy(r, found.word, sizeof r);
}

static double half_at(u32 word, int n) { return word >>= 16 * n, read_as<_Float16>(&word); }
static double bfloat_at(u32 word, int n) { return word = word >> 16 * n << 16, read_as<float>(&word); }

// c += a * b: lane (g, t) has elements 2t, 2t + 1 and 2t + 8, 2t + 9 of rows g and g + 8 of a, and of column g of b.
template <double at(u32, int)>
static void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    struct Operands {
        u32 a[4], b[2];
        float c[4];
    };
    Operands mine;
    std::memcpy(mine.a, a, sizeof a), std::memcpy(mine.b, b, sizeof b), std::memcpy(mine.c, c, sizeof c);
    mine = together<Operands>(mine, [](const Operands* given, Operands* found) {
        double x[16][16], y[8][16];
        for (int l = 0; l < 32; l++)
            for (int n = 0; n < 2; n++) {
                const int g = l / 4, t = l % 4 * 2 + n;
                x[g][t] = at(given[l].a[0], n), x[g + 8][t] = at(given[l].a[1], n);
                x[g][t + 8] = at(given[l].a[2], n), x[g + 8][t + 8] = at(given[l].a[3], n);
                y[g][t] = at(given[l].b[0], n), y[g][t + 8] = at(given[l].b[1], n);
            }
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) {
                const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
                double sum = given[l].c[i];
                for (int n = 0; n < 16; n++) sum += x[row][n] * y[column][n];
                found[l].c[i] = float(sum);
            }
    });
    std::memcpy(c, mine.c, sizeof c);
}
}  // namespace host

// c += a * b: lane (g, t) has, of each 16 columns, bytes 4t to 4t + 3 of rows g and g + 8 of a and of column g of b.
template <int sixteens>
static void multiply_bytes(int (&c)[4], const u32 (&a)[2 * sixteens], const u32 (&b)[sixteens]) {
    struct Operands {
        u32 a[2 * sixteens], b[sixteens];
        int c[4];
    };
    Operands mine;
    std::memcpy(mine.a, a, sizeof a), std::memcpy(mine.b, b, sizeof b), std::memcpy(mine.c, c, sizeof c);
    mine = host::together<Operands>(mine, [](const Operands* given, Operands* found) {
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) {
                const int row = l / 4, upper = i / 2, column = l % 4 * 2 + i % 2;
                int sum = given[l].c[i];
                for (int n = 0; n < 16 * sixteens; n++) {
                    const int t = n / 4 % 4, shift = n % 4 * 8;
                    const int x = given[4 * row + t].a[n / 16 * 2 + upper] >> shift & 0xff;
                    sum += x * int((signed char)(given[4 * column + t].b[n / 16] >> shift));
                }
                found[l].c[i] = sum;
            }
    });
    std::memcpy(c, mine.c, sizeof c);
}

static void load_matrices(u32 (&r)[4], u32 row) { host::load<false>(r, row); }
static void load_matrices(u32 (&r)[2], u32 row) { host::load<false>(r, row); }
static void load_transposed(u32 (&r)[4], u32 row) { host::load<true>(r, row); }
static void load_transposed(u32 (&r)[2], u32 row) { host::load<true>(r, row); }
static u32 transpose_halves(u32 pair) {
    return host::together<u32>(pair, [](const u32* given, u32* found) {
        for (int l = 0; l < 32; l++) {
            const int g = l / 4, t = l % 4, shift = g % 2 * 16;
            const u32 low = given[8 * t + g / 2] >> shift & 0xffff, high = given[8 * t + 4 + g / 2] >> shift & 0xffff;
            found[l] = low | high << 16;
        }
    });
}
template <bool bfloat16>
static void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    host::multiply<bfloat16 ? host::bfloat_at : host::half_at>(c, {a0, a1, a2, a3}, {b0, b1});
}
