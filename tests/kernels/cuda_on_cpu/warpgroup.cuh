// In place of the kernels' own: what four warps do together on Hopper. Products are computed when they are waited for,
// from what shared memory holds then: a place that is filled anew too early, and sums that are read too early, both show
// in the results. Sums are rounded once for 16 columns.
#pragma once
#include "primitives.cuh"

#define HAS_WARPGROUPS (__CUDA_ARCH__ == 900)

namespace host {
// Rows g and g + 8 of a 16 x 16 operand of a warp, from the registers of its lanes.
static void exchange(const u32* a, u32 (&rows)[2][8]) {
    struct Words {
        u32 a[4];
    };
    struct Rows {
        u32 words[2][8];
    };
    const Rows mine = together<Rows>(Words{a[0], a[1], a[2], a[3]}, [](const Words* given, Rows* found) {
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 16; i++) found[l].words[i % 2][i / 8 * 4 + i / 2 % 4] = given[l / 4 * 4 + i / 2 % 4].a[i / 8 * 2 + i % 2];
    });
    std::memcpy(rows, mine.words, sizeof rows);
}

// d = a * b^T (+ d), as one thread of a warpgroup sees it.
struct GroupProduct {
    float* sums;
    int columns;
    u64 a, b;
    bool add;
    bool halves = false;  // both operands, the first from registers: rows g and g + 8
    u32 rows[2][8] = {};
    const u32* operand = nullptr;  // the first operand, in registers until the end; b is summed over its rows then

    // Element `column` of a row of 128 bytes, swizzled.
    double element(u64 matrix, int row, int column) const {
        const u32 at = (matrix & 0x3fff) << 4, stride = (matrix >> 32 & 0x3fff) << 4;
        const u32 word = read_shared<u16>(swizzled(at + row / 8 * stride + row % 8 * 128 + column * 2));
        return number(word, 0);
    }
    double number(u32 word, int n) const { return BFLOAT && !halves ? bfloat_at(word, n) : half_at(word, n); }
    // The same where a row has more than 64 columns: they lie in panels.
    double across(u64 matrix, int row, int column) const {
        return element(matrix + column / 64 * (matrix >> 16 & 0x3fff), row, column % 64);
    }
    void compute() const {
        u32 a_rows[2][8];
        std::memcpy(a_rows, rows, sizeof rows);
        if (operand) exchange(operand, a_rows);
        const int first = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
        double x[2][16];
        for (int n = 0; n < 16; n++)
            for (int half = 0; half < 2; half++)
                x[half][n] = halves || operand ? number(a_rows[half][n / 2], n % 2) : element(a, first + 8 * half, n);
        for (int j = 0; j < columns / 8; j++)
            for (int c = 0; c < 2; c++) {
                double y[16];
                for (int n = 0; n < 16; n++) y[n] = operand ? across(b, n, 8 * j + pair + c) : element(b, 8 * j + pair + c, n);
                for (int half = 0; half < 2; half++) {
                    float& d = sums[4 * j + 2 * half + c];
                    double sum = add ? d : 0;
                    for (int n = 0; n < 16; n++) sum += x[half][n] * y[n];
                    d = float(sum);
                }
            }
    }
};
// A thread's products in the groups that it has closed, and those of the group that is open.
using ProductGroups = std::vector<std::vector<GroupProduct>>;
static std::map<int, ProductGroups> products;

static std::map<int, Barrier> named_barriers;
}  // namespace host

static u64 describe(u32 address, u32 leading, u32 stride) {
    if (address % 1024) host::stop("a swizzled matrix begins at a misaligned address");
    return u64(address >> 4) | u64(leading >> 4) << 16 | u64(stride >> 4) << 32 | 1ull << 62;
}
static u64 moved(u32 bytes) { return bytes >> 4; }

static void open_products() {
    __syncwarp();
    if (host::products[threadIdx.x].empty()) host::products[threadIdx.x].emplace_back();
}
static void close_products() { host::products[threadIdx.x].emplace_back(); }
template <int pending>
static void wait_products() {
    host::ProductGroups& mine = host::products[threadIdx.x];
    const int done = std::max(0, int(mine.size()) - 1 - pending);
    for (int i = 0; i < done; i++)
        for (const host::GroupProduct& product : mine[i]) product.compute();
    mine.erase(mine.begin(), mine.begin() + done);
}
template <int n>
static void hold(float (&)[n]) {}

template <bool add, int n>
static void multiply_shared(float (&d)[n], u64 a, u64 b) {
    host::products[threadIdx.x].back().push_back({d, 2 * n, a, b, add});
}

template <int n>
static void multiply_halves(float (&d)[n], const u32 (&a)[4], u64 b) {
    host::GroupProduct product{d, 2 * n, 0, b, true, true};
    host::exchange(a, product.rows);
    host::products[threadIdx.x].back().push_back(product);
}

template <int n>
static void multiply_registers(float (&d)[n], const u32* a, u64 b) {
    host::GroupProduct product{d, 2 * n, 0, b, true};
    product.operand = a;
    host::products[threadIdx.x].back().push_back(product);
}
static void __trap() { host::stop("a trap"); }
template <int count>
static void keep_registers() {}
template <int count>
static void take_registers() {}

static void arrive_at(u32 barrier) { host::bulk_barrier(barrier).arrive(0); }
static void meet(int name, int threads) {
    static const char instruction = 0;
    host::wait_at(host::named_barriers[name], threads, &instruction);
}

namespace host {
// In place of a tensor map: 16-bit elements [blocks, heads, tokens, elements], blocks `block_bytes` apart.
struct BlocksMap {
    const u8* bytes;
    u64 blocks, block_bytes, heads, tokens, elements;
};
}  // namespace host
// A box of 64 elements of all tokens of a head; outside of the array are zeros.
static void copy_box(u32 to, const void* given, int element, int token, int head, int block, u32 barrier) {
    static const u8 zeros[16] = {};
    const auto& map = *static_cast<const host::BlocksMap*>(given);
    if (to % 1024) host::stop("a box begins at a misaligned address");
    for (u32 n = 0; n < map.tokens * 8; n++) {
        const u64 at = element + n % 8 * 8, row = token + n / 8;
        u8* there = host::at_shared(swizzled(to + n * 16), 16, 16);
        const bool inside = block >= 0 && u64(block) < map.blocks && u64(head) < map.heads && row < map.tokens && at < map.elements;
        const u8* from = map.bytes + block * map.block_bytes + 2 * ((head * map.tokens + row) * map.elements + at);
        host::bulk_barrier(barrier).bring({there, inside ? from : zeros, 16});
    }
}
static void copy4(u32 to, const void* from) {
    u8* there = host::at_shared(to, 4, 4);
    std::memset(there, host::spoilt, 4);
    host::groups[threadIdx.x].back().push_back({there, static_cast<const u8*>(from), 4, 4});
}
static void wait_all_copies() {
    close_copies();
    wait_copies<0>();
}
// As load_matrices reads them.
static void store_matrices(u32 row, u32 a, u32 b, u32 c, u32 d) {
    struct Given {
        u32 row, words[4];
    };
    host::together<int>(Given{row, {a, b, c, d}}, [](const Given* given, int*) {
        for (int i = 0; i < 4; i++)
            for (int l = 0; l < 32; l++)
                std::memcpy(host::at_shared(given[8 * i + l / 4].row, 16, 16) + l % 4 * 4, &given[l].words[i], 4);
    });
}
