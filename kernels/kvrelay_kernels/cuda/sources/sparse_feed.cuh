// From global into shared memory: one warp hands out query tiles, one fills the rings of K and V.
#pragma once
#include "sparse_shape.cuh"

#if HAS_WARPGROUPS
// Takes work as long as there is some: a query tile of one head, its queries copied into the next free slot.
DEVICE void feed_queries(const Arguments& a, u8* memory, Control& control) {
    const int lane = threadIdx.x % 32;
    const u32 total = a.count * heads;
    const auto take = [&] {
        u32 index = 0;
        if (lane == 0) index = arrive(a.counter, total + gridDim.x - 1);
        return __shfl_sync(every_lane, index, 0);
    };
    u32 index = take();
    for (Turn<slots> slot;; slot.next()) {
        const bool more = index < total;
        const int head = index % heads;
        int word = -1;  // of the item
        if (more && lane < 8) word = __ldg(reinterpret_cast<const int*>(a.items + index / heads) + lane);
        wait_barrier(shared_address(control.slot_empty + slot.at), slot.phase ^ 1);
        if (lane < 8) reinterpret_cast<int*>(control.items + slot.at)[lane] = word;
        if (lane == 8) control.heads[slot.at] = head;
        __syncwarp();
        if (lane == 0) arrive_at(shared_address(control.item_known + slot.at));
        if (!more) {
            if (lane == 0) arrive_at(shared_address(control.q_full + slot.at));
            return;
        }
        const int row = __shfl_sync(every_lane, word, 0), rows = __shfl_sync(every_lane, word, 1);
        constexpr int vectors = head_dim / 8;
        const u32 to = shared_address(memory + slot.at * query_bytes);
        const u8* from = reinterpret_cast<const u8*>(a.q + ((u64)row * heads + head) * head_dim);
#pragma unroll 4
        for (int n = lane; n < mask_tile * vectors; n += 32) {
            const int r = n / vectors, v = n % vectors;
            const u64 at = (u64)min(r, rows - 1) * heads * head_dim * 2 + v * 16;
            copy16(to + v / 8 * query_panel + swizzled(r * 128 + v % 8 * 16), from + at, r < rows ? 16 : 0);
        }
        for (int r = lane; r < mask_tile; r += 32)
            copy4(shared_address(control.low[slot.at] + r), a.low + row + min(r, rows - 1));
        index = take();
        wait_all_copies();
        order_before_bulk();
        __syncwarp();
        if (lane == 0) arrive_at(shared_address(control.q_full + slot.at));
    }
}

// A ring of K or of V steps in shared memory.
template <int stages>
struct Ring {
    const void* map;
    u32 data, full, empty;
    Turn<stages> turn;

    // Waits until the next stage is free; then the copies of one step's blocks are on their way.
    DEVICE void fill(int kv_head, int block0, int block1) {
        const u32 to = data + turn.at * key_bytes, barrier = full + 8 * turn.at;
        expect_bytes(barrier, key_bytes);
#pragma unroll
        for (int p = 0; p < panels; p++) {
            copy_box(to + p * key_panel, map, 64 * p, 0, kv_head, block0, barrier);
            if constexpr (step > block_tokens)
                copy_box(to + p * key_panel + block_tokens * 128, map, 64 * p, 0, kv_head, block1, barrier);
        }
        turn.next();
    }
    DEVICE void wait() const { wait_barrier(empty + 8 * turn.at, turn.phase ^ 1); }
};

// Fills the rings in the order in which the multiplying warpgroups empty them: K runs one step ahead of V.
DEVICE void feed_keys(const Arguments& a, u8* memory, Control& control) {
    const int lane = threadIdx.x % 32;
    Ring<k_stages> k{a.k_map, shared_address(memory + keys_at), shared_address(control.k_full), shared_address(control.k_empty)};
    Ring<v_stages> v{a.v_map, shared_address(memory + values_at), shared_address(control.v_full), shared_address(control.v_empty)};
    for (Turn<slots> slot;; slot.next()) {
        wait_barrier(shared_address(control.item_known + slot.at), slot.phase);
        const Item item = control.items[slot.at];
        const int kv_head = control.heads[slot.at] / (heads / kv_heads);
        __syncwarp();
        if (lane == 0) arrive_at(shared_address(control.slot_empty + slot.at));
        if (item.tiles < 0) return;
        const int blocks = (item.length + block_tokens - 1) / block_tokens;
        int late0 = no_block, late1 = no_block;  // the step whose V is still to come
        bool first = true;
        for (int begin = 0; begin < item.tiles; begin += 32) {
            int entry = 0, found0 = no_block, found1 = no_block;  // each lane looks up one tile
            if (begin + lane < item.tiles) {
                entry = __ldg(a.list + item.first + begin + lane);
                const int block = (entry >> 1) * 2;
                found0 = a.first_block + __ldg(a.tables + item.table + block);
                if (block + 1 < blocks) found1 = a.first_block + __ldg(a.tables + item.table + block + 1);
            }
            for (int n = 0; n < min(32, item.tiles - begin); n++) {
                const int now = __shfl_sync(every_lane, entry, n);
                const int block0 = __shfl_sync(every_lane, found0, n), block1 = __shfl_sync(every_lane, found1, n);
                if (lane > 0) continue;
#pragma unroll
                for (int part = steps_per_tile - 1; part >= 0; part--) {
                    const int here0 = part == 0 ? block0 : block1, here1 = block1;
                    k.wait();
                    control.entries[k.turn.at] = (now & ~1) * mask_tile + part * step * 2 + (now & 1);
                    k.fill(kv_head, here0, here1);
                    if (!first) {
                        v.wait();
                        v.fill(kv_head, late0, late1);
                    }
                    late0 = here0, late1 = here1, first = false;
                }
            }
            __syncwarp();
        }
        if (lane == 0 && item.tiles > 0) {
            v.wait();
            v.fill(kv_head, late0, late1);
        }
        __syncwarp();
    }
}
#endif
