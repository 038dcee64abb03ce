// Attention of prompts over the paged 16-bit cache, on Hopper: tiles of 128 queries visit the key tiles on their list.
//
// Three warpgroups stay on a multiprocessor. One feeds shared memory by the copy engine. Two multiply, 64 query rows
// each: the scores of the next step and this step's values are on the tensor cores while exponents are taken, those of
// the next query tile while rows are written, and where one warpgroup waits, the other works. Source of the schedule:
// FlashAttention-3 (Shah et al., 2024), without its barriers between the warpgroups, which gained nothing here.
// A row's sums run over its keys in one order, from the last tile to the first, wherever its tile begins.
#include "sparse_feed.cuh"
#include "sparse_softmax.cuh"

extern __shared__ __align__(1024) u8 memory[];

#if HAS_WARPGROUPS
constexpr int group_threads = 128;
constexpr int group_barrier = 1;  // and the next: named barriers, one for each multiplying warpgroup

// Scores of a step: 64 queries by its keys.
DEVICE void start_scores(float (&s)[step / 2], u64 q, u64 k) {
    open_products();
#pragma unroll
    for (int d = 0; d < head_dim / 16; d++) {
        const u64 a = q + moved(d / 4 * query_panel + d % 4 * 32), b = k + moved(d / 4 * key_panel + d % 4 * 32);
        if (d == 0) multiply_shared<false>(s, a, b);
        else multiply_shared<true>(s, a, b);
    }
    close_products();
}

// Whether keys of a step are hidden from some row, as the compiler knows it: where none are, its loop stays short.
struct Masked { static constexpr bool some = true; };
struct Whole { static constexpr bool some = false; };

// Adds a step's values, weighted, to the output.
DEVICE void start_output(float (&o)[outputs][columns / 2], const u32 (&p)[step / 4], u64 v) {
    open_products();
#pragma unroll
    for (int n = 0; n < step / 16; n++) {
#pragma unroll
        for (int part = 0; part < outputs; part++)
            multiply_registers(o[part], p + 4 * n, v + moved(n * 2 * unit + part * 2 * key_panel));
    }
    close_products();
}

DEVICE void hold_output(float (&o)[outputs][columns / 2]) {
#pragma unroll
    for (int part = 0; part < outputs; part++) hold(o[part]);
}

// Values behind the sequence's end are whatever the block held before; zero times that must be zero.
DEVICE void clear_tail(u32 values, int valid, int group) {
    if (valid >= step) return;
#pragma unroll 1
    for (int n = threadIdx.x % group_threads; n < (step - valid) * 8; n += group_threads) {
#pragma unroll
        for (int p = 0; p < panels; p++)
            store_shared4(values + p * key_panel + valid * 128 + n * 16, 0, 0, 0, 0);
    }
    order_before_bulk();
    meet(group_barrier + group, group_threads);
}

// The output of 64 rows: through the place of their queries, which nobody reads any more, to whole vectors.
DEVICE void write_rows(const Arguments& a, const Item& item, int head, u8* queries, int group,
                       const float (&o)[outputs][columns / 2], float inverse0, float inverse1) {
    const int lane = threadIdx.x % 32, first = group * 64 + threadIdx.x % group_threads / 32 * 16;
    const u32 to = shared_address(queries);
    meet(group_barrier + group, group_threads);
#pragma unroll
    for (int n = 0; n < head_dim / 16; n++) {
        const float* x = &o[n * 16 / columns][n * 8 % (columns / 2)];
        const int row = first + lane % 16, vector = 2 * n + lane / 16;
        store_matrices(to + vector / 8 * query_panel + swizzled(row * 128 + vector % 8 * 16),
                       pack<bfloat>(x[0] * inverse0, x[1] * inverse0), pack<bfloat>(x[2] * inverse1, x[3] * inverse1),
                       pack<bfloat>(x[4] * inverse0, x[5] * inverse0), pack<bfloat>(x[6] * inverse1, x[7] * inverse1));
    }
    __syncwarp();
    constexpr int vectors = head_dim / 8;
    for (int n = lane; n < 16 * vectors; n += 32) {
        const int row = first + n / vectors, vector = n % vectors;
        if (row >= item.rows) continue;
        uint4 x;
        load_shared4(x.x, x.y, x.z, x.w, to + vector / 8 * query_panel + swizzled(row * 128 + vector % 8 * 16));
        *reinterpret_cast<uint4*>(a.out + ((u64)(item.row + row) * heads + head) * head_dim + vector * 8) = x;
    }
}

// Rows that see no key at all.
DEVICE void write_zeros(const Arguments& a, const Item& item, int head, int group) {
    constexpr int vectors = head_dim / 8;
    for (int n = threadIdx.x % group_threads; n < 64 * vectors; n += group_threads) {
        const int row = group * 64 + n / vectors;
        if (row >= item.rows) continue;
        *reinterpret_cast<uint4*>(a.out + ((u64)(item.row + row) * heads + head) * head_dim + n % vectors * 8) = uint4{};
    }
}

DEVICE void multiply_tiles(const Arguments& a, u8* memory, Control& control) {
    const int lane = threadIdx.x % 32;
    const int group = __shfl_sync(every_lane, threadIdx.x / group_threads, 0) - 1;  // tells the compiler: for all
    const int row = group * 64 + threadIdx.x % group_threads / 32 * 16 + lane / 4;
    const u32 base = shared_address(memory);
    const u64 queries = describe(base + group * 64 * 128, 16, unit), keys = describe(base + keys_at, 16, unit);
    const u64 values = describe(base + values_at, key_panel, unit);
    Turn<k_stages> k;
    Turn<v_stages> v;
    Turn<slots> slot;

    const auto take_item = [&] {
        wait_barrier(shared_address(control.q_full + slot.at), slot.phase);
        Item item = control.items[slot.at];
        item.tiles = __shfl_sync(every_lane, item.tiles, 0);  // as above
        return item;
    };
    const auto free_slot = [&](const Turn<slots>& place) {
        __syncwarp();
        if (lane == 0) arrive_at(shared_address(control.slot_empty + place.at));
    };
    float s[step / 2];
    int entry;  // of the step whose scores come next
    const auto wait_keys = [&] {
        wait_barrier(shared_address(control.k_full + k.at), k.phase);
        entry = control.entries[k.at];
    };
    const auto start_step = [&] {
        hold(s);
        start_scores(s, queries + moved(slot.at * query_bytes), keys + moved(k.at * key_bytes));
    };

    for (;;) {
        Item item = take_item();
        int head = control.heads[slot.at];
        if (item.tiles < 0) return;
        if (item.tiles == 0) {
            write_zeros(a, item, head, group);
            free_slot(slot);
            slot.next();
            continue;
        }
        // Before the rows of a tile are written the first scores of the next one are on the tensor cores.
        wait_keys();
        for (start_step();;) {
            Softmax softmax(item, row, control.low[slot.at][row], control.low[slot.at][row + 8]);
            float o[outputs][columns / 2], factor[2];
            u32 p[step / 4];
            int first_key;
            bool rescale;
#pragma unroll
            for (int part = 0; part < outputs; part++) {
#pragma unroll
                for (int i = 0; i < columns / 2; i++) o[part][i] = 0;
            }
            const auto mask_scores = [&] {
                hold(s);
                softmax.mask(s, entry >> 1);
            };
            const auto take_scores = [&] {
                hold(s);
                __syncwarp();
                if (lane == 0) arrive_at(shared_address(control.k_empty + k.at));
                k.next();
                first_key = entry >> 1;
                rescale = softmax.find_exponents<0>(s, factor, a.scale_log2);
                softmax.raise<0>(s, factor);
                rescale |= softmax.find_exponents<1>(s, factor, a.scale_log2);
            };
            const auto pack_scores = [&](bool more) {
                if (more) wait_keys();
                pack_operand<0>(p, s);
                softmax.raise<1>(s, factor);
                pack_operand<1>(p, s);
            };
            const auto start_values = [&] {
                wait_barrier(shared_address(control.v_full + v.at), v.phase);
                clear_tail(base + values_at + v.at * key_bytes, max(item.length - first_key, 0), group);
                hold_output(o);
                start_output(o, p, values + moved(v.at * key_bytes));
            };
            const auto values_done = [&] {
                hold_output(o);
                if (lane == 0) arrive_at(shared_address(control.v_empty + v.at));
                v.next();
            };

            const int steps = item.tiles * steps_per_tile;
            const auto next_step = [&](int n, auto keys) {
                start_step();
                start_values();
                wait_products<1>();
                if constexpr (decltype(keys)::some) mask_scores();
                take_scores();
                if (__all_sync(every_lane, softmax.sum[0] < 0)) __trap();  // never; a branch that the wait below does not pass
                wait_products<0>();
                values_done();
                if (rescale) {
#pragma unroll
                    for (int part = 0; part < outputs; part++) {
#pragma unroll
                        for (int i = 0; i < columns / 2; i++) o[part][i] *= factor[i / 2 % 2];
                    }
                }
                pack_scores(n + 1 < steps);
            };

            wait_products<0>();
            if (entry & 1) mask_scores();
            take_scores();
            pack_scores(steps > 1);
            for (int n = 1; n < steps;) {
                if (entry & 1) {
                    next_step(n++, Masked{});
                } else {
                    do next_step(n++, Whole{});
                    while (n < steps && !(entry & 1));
                }
            }
            start_values();
            const float inverse0 = softmax.inverse(0), inverse1 = softmax.inverse(1);
            const Turn<slots> done = slot;
            const auto conclude = [&] {
                values_done();
                write_rows(a, item, head, memory + done.at * query_bytes, group, o, inverse0, inverse1);
                free_slot(done);
            };
            slot.next();
            Item next{};
            if constexpr (slots > 1) next = take_item();
            if (next.tiles <= 0) {
                wait_products<0>();
                conclude();
                break;
            }
            wait_keys();
            start_step();
            wait_products<1>();
            conclude();
            item = next;
            head = control.heads[slot.at];
        }
    }
}
#endif

extern "C" __global__ void __launch_bounds__(3 * 128, 1)
block_sparse(const u16* q, u16* out, const void* k_map, const void* v_map, const int* tables, const Item* items,
             const int* list, const int* low, u32* counter, int count, int first_block, float scale_log2) {
#if HAS_WARPGROUPS
    const Arguments a{q, out, k_map, v_map, tables, items, list, low, counter, count, first_block, scale_log2};
    Control& control = *reinterpret_cast<Control*>(memory + control_at);
    if (threadIdx.x == 0) {
        prefetch_map(k_map);
        prefetch_map(v_map);
        constexpr int warps = 4 * multipliers;
        for (int i = 0; i < k_stages; i++) {
            create_barrier(shared_address(control.k_full + i), 1);
            create_barrier(shared_address(control.k_empty + i), warps);
        }
        for (int i = 0; i < v_stages; i++) {
            create_barrier(shared_address(control.v_full + i), 1);
            create_barrier(shared_address(control.v_empty + i), warps);
        }
        for (int i = 0; i < slots; i++) {
            create_barrier(shared_address(control.item_known + i), 1);
            create_barrier(shared_address(control.q_full + i), 1);
            create_barrier(shared_address(control.slot_empty + i), warps + 1);
        }
        publish_barriers();
    }
    __syncthreads();
    if (threadIdx.x < group_threads) {
        keep_registers<40>();
        if (threadIdx.x < 32) feed_keys(a, memory, control);
        else if (threadIdx.x < 64) feed_queries(a, memory, control);
    } else {
        take_registers<232>();
        multiply_tiles(a, memory, control);
    }
#endif
}
