// How the portable kernel lays out shared memory, and the ring that all threads of a block fill with keys and values.
#pragma once
#include "sparse_work.cuh"

constexpr int rows = ROWS;    // queries of a thread block: a tile of the mask, or half of one
constexpr int warps = WARPS;
constexpr int slots = SLOTS;  // of the ring: each holds the keys, or the values, of one step
constexpr int parts = mask_tile / rows;
constexpr int threads = 32 * warps;
constexpr int warp_rows = rows / warps;
constexpr int step = block_tokens;       // keys of one step
constexpr int row_bytes = head_dim * 2;
constexpr int vectors = row_bytes / 16;  // of 16 bytes in a row
constexpr int query_panel = rows * 128;
constexpr int slot_panel = step * 128;
constexpr int slot_bytes = panels * slot_panel;
constexpr int ring_at = panels * query_panel;
static_assert(warp_rows % 16 == 0 && threads / 8 % 8 == 0 && slots >= 2);

// An uncoded block in the cache: the keys of every head, then the values.
constexpr int side_bytes = block_tokens * row_bytes;
constexpr u64 block_bytes = 2 * kv_heads * side_bytes;

struct Arguments {
    const u16* q;       // [rows, heads, head_dim]
    u16* out;           // as q
    const u8* keys;     // of the first block
    const u8* values;
    const int* tables;
    const Item* items;  // the longest first
    const int* list;
    const int* low;     // [rows]: the first key that a row sees behind the prefix
    int first_block;    // of this layer
    float scale_log2;
};

// Where 16 bytes of a row lie in a matrix of panels, and the address of others of the same row.
DEVICE u32 place(int row, int vector, int panel) { return vector / 8 * panel + swizzled(row * 128 + vector % 8 * 16); }
DEVICE u32 beside(u32 address, int vector, int panel) { return (address ^ vector % 8 * 16) + vector / 8 * panel; }

// One block of a sequence: where it lies, and its first key * 2 + whether the mask hides some of its tile.
struct Step {
    int block, entry;
    DEVICE int first_key() const { return entry >> 1; }
    DEVICE bool partial() const { return entry & 1; }
};

// The steps of an item, from the last key that a row up to position `last` sees to the first. Each lane of a warp has
// looked up one of 32.
struct Steps {
    int first, table;  // of the item
    int next, end, looked_up;
    Step mine;

    DEVICE Steps(const Arguments& a, const Item& item, int last)
        : first(item.first), table(item.table), next(0), end(2 * item.tiles), mine{0, 0} {
        while (next < end && find(a, next).first_key() > last) next++;
        looked_up = next;
        look_up(a);
    }
    DEVICE Step find(const Arguments& a, int n) const {
        const int tile = __ldg(a.list + first + n / 2);
        return {0, (tile >> 1) * mask_tile * 2 + (n % 2 == 0) * step * 2 + (tile & 1)};
    }
    DEVICE void look_up(const Arguments& a) {
        const int n = looked_up + threadIdx.x % 32;
        if (n >= end) return;
        mine = find(a, n);
        mine.block = a.first_block + __ldg(a.tables + table + mine.first_key() / block_tokens);
    }
    DEVICE Step take(const Arguments& a) {
        if (next == looked_up + 32) looked_up = next, look_up(a);
        const int lane = next++ - looked_up;
        return {__shfl_sync(every_lane, mine.block, lane), __shfl_sync(every_lane, mine.entry, lane)};
    }
};

// Keys and values of the steps in turn, copied by all threads of the block into a ring of slots.
struct Ring {
    // What lies in a slot; the step is told with its keys.
    struct Slot {
        u32 address;
        Step step;
    };
    u32 memory;           // shared address of the first slot
    int head_at, length;  // where a KV head lies in a side of a block; keys of the sequence
    int fill;             // the slot to fill next
    bool values;          // come next; otherwise keys do
    Steps steps;
    Step now;             // the last step whose keys were asked for

    DEVICE Ring(const Arguments& a, const Item& item, int last, int kv_head, u32 memory)
        : memory(memory), head_at(kv_head * side_bytes), length(item.length), fill(0), values(false),
          steps(a, item, last), now{0, 0} {}

    // Asks for what comes next. Also where nothing does, the copies are closed, so that they can be counted.
    DEVICE void advance(const Arguments& a) {
        if (values || steps.next < steps.end) {
            if (!values) {
                now = steps.take(a);
                if (threadIdx.x == 0) store_shared(memory + slots * slot_bytes + fill * 4, now.entry);
            }
            copy(values ? a.values : a.keys);
            values = !values;
        }
        close_copies();
        fill = fill + 1 == slots ? 0 : fill + 1;
    }

    // The oldest slot, once it is filled; the one before it, which all threads are done with, is filled anew.
    DEVICE Slot take(const Arguments& a) {
        wait_copies<slots - 2>();
        __syncthreads();
        advance(a);
        return {memory + fill * slot_bytes, {0, int(load_shared(memory + slots * slot_bytes + fill * 4))}};
    }

    // What lies behind the sequence's end is whatever the block held before: zero here, for zero times NaN is NaN.
    DEVICE void copy(const u8* side) const {
        const int row = threadIdx.x / 8, vector = threadIdx.x % 8, valid = length - now.first_key();
        const u8* from = side + u32(now.block) * block_bytes + head_at + row * row_bytes + vector * 16;
        const u32 to = memory + fill * slot_bytes + place(row, vector, slot_panel);
#pragma unroll
        for (int i = 0; i < step; i += threads / 8) {
#pragma unroll
            for (int p = 0; p < panels; p++) {
                if (p * 8 + vector < vectors)
                    copy16(to + p * slot_panel + i * 128, from + p * 128 + i * row_bytes, row + i < valid ? 16 : 0);
            }
        }
    }
};
