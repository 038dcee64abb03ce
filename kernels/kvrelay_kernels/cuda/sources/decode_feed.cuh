// From the arena into shared memory: each warp keeps its own ring of tiles filled.
#pragma once
#include "decode_scales.cuh"
#include "schedule.cuh"

constexpr bool engine = has_bulk_copies && (boxed || widened);  // copies codes; scales are too small for it

struct Arguments {
    const u16* q;        // [sequences * rows, kv_heads * heads_per_kv, head_dim]
    const void* map;     // of the whole arena as rows of 128 bytes, for the copy engine
    const u8* cache;     // one layer of the arena: [blocks, block_bytes]
    int cache_row;       // of 128 bytes: where that layer begins in the arena
    const int* tables;   // [sequences, table_stride]
    const Header* plan;  // what decode_plan wrote
    u16* out;            // as q
    float4* partials;    // [ranges, 2, side, tile_queries, head_dim / 2], `absent` between launches: two dimensions, peak (log2), sum
    int table_stride, ranges;
    float scale_log2;    // softmax scale * log2(e), times the unit of scores
    int window;          // 0: none
};

// A piece in the terms of the kernel.
struct Work {
    Piece piece;
    int first_head, head;  // of those side by side; this warp's
    int first_query, tiles;

    DEVICE explicit Work(const Piece& p)
        : piece(p), first_head(p.head / query_tiles * side), head(first_head + threadIdx.x / 32 / team),
          first_query(p.head % query_tiles * query_tile) {
        const int tokens = min(p.blocks * block_tokens, p.length - p.first_block * block_tokens);
        tiles = (tokens + tile - 1) / tile;
    }
};

// Asynchronous copies of this warp's tiles. A stage is filled anew when the tile behind it is there, not before: memory
// is read the faster the fewer places are asked for at once.
struct Feed {
    u32 ring, wide, raised, scales, barriers;  // shared addresses
    u32 phases;                  // a bit a stage: which phase of its barrier comes next
    int fill, drain;             // stages
    int next;                    // the tile to fetch next
    int base;                    // a lane holds where blocks `base + lane` and `base + 32 + lane` of the piece lie
    int here, beyond;

    DEVICE Feed(u32 memory, int warp)
        : ring(memory + warp * ring_bytes),
          wide(ring + stages * stage_bytes),
          raised(wide + widened_bytes),
          scales(memory + scales_at + warp * stages * scale_frames * scale_bytes),
          barriers(memory + barriers_at + warp * stages * 8),
          phases(0) {
        if (threadIdx.x % 32 == 0)
            for (int i = 0; i < stages; i++) create_barrier(barriers + 8 * i);
        publish_barriers();
        __syncwarp();
    }

    // A warp never goes on by more than 16 blocks at once: what it looks up has been there for long.
    DEVICE static int look_up(const Arguments& a, const Work& s, int first) {
        const int index = first + int(threadIdx.x & 31);
        if (index >= s.piece.blocks) return 0;
        return load_near(a.tables + (u64)s.piece.sequence * a.table_stride + s.piece.first_block + index);
    }
    DEVICE int block_of(const Arguments& a, const Work& s, int index) {
        if (index >= base + 32) base += 32, here = beyond, beyond = look_up(a, s, base + 32);
        return __shfl_sync(every_lane, here, index - base);
    }

    DEVICE void fetch(const Arguments& a, const Work& s, int block, int token, int valid) const {
        const int lane = threadIdx.x & 31, row = s.head * block_tokens + token;
        const u32 to = ring + fill * stage_bytes;
        const u8* from = a.cache + (u64)u32(block) * block_bytes;
        if constexpr (engine) {
            if (lane == 0) {
                const u32 barrier = barriers + 8 * fill;
                expect_bytes(barrier, 2 * tile * fetched_row_bytes);
                if constexpr (widened) {
                    const u8* first = from + row * fetched_row_bytes;
                    copy_bytes(to, first + k_side.codes, tile * fetched_row_bytes, barrier);
                    copy_bytes(to + fetched_v_at, first + v_side.codes, tile * fetched_row_bytes, barrier);
                } else {
                    const int at = a.cache_row + block * (block_bytes / 128) + row * row_bytes / 128;
                    copy_box<query_tiles == 1>(to, a.map, at + k_side.codes / 128, barrier);
                    copy_box<query_tiles == 1>(to + v_at, a.map, at + v_side.codes / 128, barrier);
                }
            }
        } else {
            for (int n = lane; n < tile * fetched_row_bytes / 16; n += 32) {
                const u8* piece = from + row * fetched_row_bytes + n * 16;
                const u32 there = to + (widened ? n * 16 : swizzled(n * 16));
                copy16(there, piece + k_side.codes);
                copy16(there + fetched_v_at, piece + v_side.codes);
            }
        }
        if constexpr (coded) {  // what lies past the end is not even defined: its scales are read as zero
            constexpr int each = coded ? scale_bytes / 16 : 1, all = scale_frames * each;  // 16-byte pieces: of a frame, of all
            const u8* scale_row = from + row * token_scale_bytes;
#pragma unroll
            for (int i = 0; i < (all + 31) / 32; i++) {
                const int n = i * 32 + lane, which = n / each, piece = n % each;
                const Side& side = which < scale_frames / 2 ? k_side : v_side;
                const int frame = affine && which % 2 ? side.biases : side.scales;
                if (all % 32 && n >= all) continue;
                copy16(scales + fill * scale_frames * scale_bytes + n * 16, scale_row + (frame + piece * 16),
                       valid * token_scale_bytes - piece * 16);
            }
        }
    }

    DEVICE void advance(const Arguments& a, const Work& s) {
        if (next < s.tiles) {
            const int block = block_of(a, s, u32(next) / tiles_per_block), token = u32(next) % tiles_per_block * tile;
            fetch(a, s, block, token, s.piece.length - (s.piece.first_block * block_tokens + next * tile));
            next += team;
        }
        close_copies();
        fill = fill + 1 == stages ? 0 : fill + 1;
    }

    // Whether none of the tiles that `begin` asks for holds a token of this step, which a kernel ahead may yet write.
    DEVICE static bool begins_old(const Work& s, int first) {
        const int last = min(first + (stages - 1) * team, s.tiles - 1);
        return s.piece.first_block * block_tokens + (last + 1) * tile <= s.piece.length - rows;
    }

    DEVICE void begin(const Arguments& a, const Work& s, int first) {
        fill = drain = 0;
        next = first, base = 0;
        here = look_up(a, s, 0), beyond = look_up(a, s, 32);
#pragma unroll 1
        for (int i = 0; i < stages; i++) advance(a, s);
    }

    // Until the stage to drain is there; `valid` of its tokens exist.
    DEVICE void wait(int valid) {
        wait_copies<stages - 2>();
        if constexpr (engine) wait_barrier(barriers + 8 * drain, phases >> drain & 1);
        phases ^= 1u << drain;
        __syncwarp();
        if (!coded && valid < tile) {  // probability 0 times an undefined value must be 0
            const u32 values = ring + drain * stage_bytes + v_at;
            for (int n = valid * row_bytes / 4 + threadIdx.x % 32; n < tile * row_bytes / 4; n += 32)
                store_shared(values + swizzled(n * 4), 0);
            order_before_bulk();
            __syncwarp();
        }
        if constexpr (widened) {
            widen(wide, ring + drain * stage_bytes);
            widen(wide + v_at, ring + drain * stage_bytes + fetched_v_at);
            __syncwarp();
        }
        if constexpr (scaled_codes) {
            raise_scales(raised, fetched_scales());
            raise_scales(raised + tile * raised_token_bytes, fetched_scales() + v_scales_at);
            __syncwarp();
        }
    }

    // A tile's rows, one behind the other: three words of codes become four.
    DEVICE static void widen(u32 to, u32 from) {
        constexpr int units = tile * fetched_row_bytes / 12;
#pragma unroll
        for (int i = 0; i < (units + 31) / 32; i++) {
            const int n = i * 32 + threadIdx.x % 32;
            if (units % 32 && n >= units) break;
            const u32 a = load_shared(from + 12 * n), b = load_shared(from + 12 * n + 4), c = load_shared(from + 12 * n + 8);
            store_shared4(to + swizzled(16 * n), widen_codes<bits>(a), widen_codes<bits>(a >> 24 | b << 8),
                          widen_codes<bits>(b >> 16 | c << 16), widen_codes<bits>(c >> 8));
        }
    }

    DEVICE u32 stage() const { return widened ? wide : ring + drain * stage_bytes; }
    DEVICE u32 fetched_scales() const { return scales + drain * scale_frames * scale_bytes; }
    DEVICE u32 stage_scales() const { return scaled_codes ? raised : fetched_scales(); }
    DEVICE void release() { drain = drain + 1 == stages ? 0 : drain + 1; }
};
