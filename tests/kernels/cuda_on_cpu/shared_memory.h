// Dynamic shared memory of the thread block that runs, and what is on its way into it.
//
// Copies arrive as late as they may, and what lay at their place is spoilt when they are asked for: a read that does
// not wait, and a stage that is refilled while somebody still reads it, both show in the results.
#pragma once
#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

#include "fibers.h"

namespace host {
constexpr int most_shared_bytes = 1 << 18, spoilt = 0xff;
alignas(1024) static u8 shared[most_shared_bytes];
static int shared_bytes;  // what the launch asked for

// The `bytes` at a shared address, which must be a multiple of `unit`.
static u8* at_shared(u32 address, int bytes, u32 unit) {
    if (address % unit || address + u64(bytes) > u64(shared_bytes)) stop("a shared address out of range, or misaligned");
    return shared + address;
}

// `size` bytes on their way, or fewer with zeros behind them.
struct Copy {
    u8* to;
    const u8* from;
    int valid, size = 16;

    void land() const { std::memcpy(to, from, valid), std::memset(to + valid, 0, size - valid); }
};
// A thread's copies in the groups that it has closed, and those of the group that is open.
using Groups = std::vector<std::vector<Copy>>;
static std::vector<Groups> groups;

// A barrier of the copy engine: a phase ends when all have arrived and all bytes that they expect are there.
struct BulkBarrier : Barrier {
    int count, expected_bytes = 0, pushed_bytes = 0, waiting = 0;
    std::vector<Copy> coming;

    bool complete() {
        const int bytes = int(coming.size()) * 16 + pushed_bytes;
        if (arrived < count || bytes < expected_bytes) return false;
        if (bytes > expected_bytes) stop("more bytes come to a barrier than it expects");
        for (const Copy& copy : coming) copy.land();
        coming.clear(), arrived = 0, expected_bytes = 0, pushed_bytes = 0, generation++;
        return true;
    }
    void arrive(int bytes) {
        if (arrived == count && !complete()) stop("more threads arrive at a barrier than it counts");
        arrived++, expected_bytes += bytes;
        if (waiting) complete();
    }
    void bring(const Copy& copy) {
        std::memset(copy.to, spoilt, 16);
        coming.push_back(copy);
        if (waiting) complete();
    }
    void wait(u32 phase) {
        while ((generation & 1u) == phase && !complete()) waiting++, give_way(*this), waiting--;
    }
};
static std::map<u32, BulkBarrier> bulk_barriers;
static BulkBarrier& bulk_barrier(u32 address) {
    const auto found = bulk_barriers.find(address);
    if (found == bulk_barriers.end()) stop("a barrier that nobody has created");
    return found->second;
}

// In place of a tensor map: bytes as rows of 128, and how many rows a box has.
struct BoxMap {
    const u8* bytes;
    u64 size, box_rows;
};

// In place of a tensor map that is a parameter: a contiguous matrix of 16-bit elements, and how many rows a box has.
struct MatrixMap {
    const u8* bytes;
    u64 rows, columns, box_rows;
};

// The same of bytes in three dimensions.
struct PlanesMap {
    const u8* bytes;
    u64 planes, rows, width, box_planes, box_rows, box_width;
};

static void begin_shared(int threads) {
    std::memset(shared, spoilt, shared_bytes);
    groups.assign(threads, Groups(1)), bulk_barriers.clear();
}
}  // namespace host

static u32 shared_address(const void* pointer) {
    const auto offset = static_cast<const u8*>(pointer) - host::shared;
    if (offset < 0 || offset > host::shared_bytes) host::stop("no address in dynamic shared memory");
    return offset;
}
template <class T>
static T read_shared(u32 address) {
    T value;
    return std::memcpy(&value, host::at_shared(address, sizeof value, sizeof value), sizeof value), value;
}
static u32 load_shared(u32 address) { return read_shared<u32>(address); }
static void load_shared2(u32& a, u32& b, u32 address) {
    const uint2 v = read_shared<uint2>(address);
    a = v.x, b = v.y;
}
static void load_shared4(u32& a, u32& b, u32& c, u32& d, u32 address) {
    const uint4 v = read_shared<uint4>(address);
    a = v.x, b = v.y, c = v.z, d = v.w;
}
static u32 load_shared_half(u32 address) { return read_shared<u16>(address); }
static u32 load_shared_byte(u32 address) { return read_shared<u8>(address); }
static void store_shared(u32 address, u32 word) { std::memcpy(host::at_shared(address, 4, 4), &word, 4); }
static void store_shared2(u32 address, u32 a, u32 b) {
    const u32 words[2] = {a, b};
    std::memcpy(host::at_shared(address, 8, 8), words, 8);
}
static void store_shared_byte(u32 address, u32 byte) { *host::at_shared(address, 1, 1) = byte; }
static void store_shared4(u32 address, u32 a, u32 b, u32 c, u32 d) {
    const u32 words[4] = {a, b, c, d};
    std::memcpy(host::at_shared(address, 16, 16), words, 16);
}

static void copy16(u32 to, const u8* from, int valid = 16) {
    u8* there = host::at_shared(to, 16, 16);
    if (u64(from) % 16) host::stop("a copy from a misaligned address");
    std::memset(there, host::spoilt, 16);
    host::groups[threadIdx.x].back().push_back({there, from, std::max(0, std::min(16, valid))});
}
static void close_copies() { host::groups[threadIdx.x].emplace_back(); }
template <int pending>
static void wait_copies() {
    host::Groups& mine = host::groups[threadIdx.x];
    const int landed = std::max(0, int(mine.size()) - 1 - pending);
    for (int i = 0; i < landed; i++)
        for (const host::Copy& copy : mine[i]) copy.land();
    mine.erase(mine.begin(), mine.begin() + landed);
}

constexpr bool has_bulk_copies = __CUDA_ARCH__ >= 900;
static void prefetch_map(const void*) {}
static void create_barrier(u32 barrier, int count = 1) {
    host::at_shared(barrier, 8, 8);
    host::bulk_barriers[barrier] = {};
    host::bulk_barriers[barrier].count = count;
}
static void publish_barriers() {}
static void order_before_bulk() {}
static void expect_bytes(u32 barrier, int bytes) { host::bulk_barrier(barrier).arrive(bytes); }
static void wait_barrier(u32 barrier, u32 phase) { host::bulk_barrier(barrier).wait(phase); }
static u32 swizzled(u32 offset) { return offset ^ (offset >> 3 & 0x70); }
template <bool once = false>
static void copy_box(u32 to, const void* given, int row, u32 barrier) {
    static const u8 zeros[16] = {};
    const auto& map = *static_cast<const host::BoxMap*>(given);
    if (to % 128) host::stop("a box begins at a misaligned address");
    for (u32 n = 0; n < map.box_rows * 128; n += 16) {
        const u64 at = u64(row) * 128 + n;
        u8* there = host::at_shared(swizzled(to + n), 16, 16);  // the engine swizzles by the address, not by the offset
        host::bulk_barrier(barrier).bring(at < map.size ? host::Copy{there, map.bytes + at, 16} : host::Copy{there, zeros, 16});
    }
}
// A box of 64 columns of a matrix of 16-bit elements; outside of it are zeros.
static void copy_box(u32 to, const void* given, int column, int row, u32 barrier) {
    static const u8 zeros[16] = {};
    const auto& map = *static_cast<const host::MatrixMap*>(given);
    if (to % 1024) host::stop("a box begins at a misaligned address");
    for (u32 n = 0; n < map.box_rows * 8; n++) {
        const u64 at_row = row + n / 8, at_column = column + n % 8 * 8;
        u8* there = host::at_shared(swizzled(to + n * 16), 16, 16);
        const bool inside = at_row < map.rows && at_column < map.columns;
        const u8* from = inside ? map.bytes + 2 * (at_row * map.columns + at_column) : zeros;
        host::bulk_barrier(barrier).bring({there, from, 16});
    }
}
static void copy_box_once(u32 to, const void* map, int column, int row, u32 barrier) { copy_box(to, map, column, row, barrier); }
static void copy_planes_once(u32 to, const void* given, int row, int plane, u32 barrier, int column = 0) {
    static const u8 zeros[16] = {};
    const auto& map = *reinterpret_cast<const host::PlanesMap*>(given);
    if (to % 128) host::stop("a box begins at a misaligned address");
    for (u64 p = plane; p < plane + map.box_planes; p++)
        for (u64 r = row; r < row + map.box_rows; r++)
            for (u32 n = 8 * column; n < 8 * column + map.box_width; n += 16, to += 16) {
                const bool inside = p < map.planes && r < map.rows && n < map.width;
                const u8* from = inside ? map.bytes + (p * map.rows + r) * map.width + n : zeros;
                host::bulk_barrier(barrier).bring({host::at_shared(to, 16, 16), from, 16});
            }
}
static void copy_bytes(u32 to, const u8* from, int bytes, u32 barrier) {
    if (bytes % 16 || u64(from) % 16) host::stop("a bulk copy of misaligned bytes");
    for (int n = 0; n < bytes; n += 16) host::bulk_barrier(barrier).bring({host::at_shared(to + n, 16, 16), from + n, 16});
}
