// From the arena into shared memory: each warp keeps its own ring of tiles filled.
#pragma once
#include "decode_shape.cuh"
#include "schedule.cuh"

struct Arguments {
    const u16* q;        // [sequences * rows, kv_heads * heads_per_kv, head_dim]
    const void* map;     // of the whole arena as rows of 128 bytes, for the copy engine
    const u8* cache;     // one layer of the arena: [blocks, block_bytes]
    int cache_row;       // of 128 bytes: where that layer begins in the arena
    const int* tables;   // [sequences, table_stride]
    const Header* plan;  // what decode_plan wrote
    u16* out;            // as q
    float* partials;     // [ranges + sequences * heads, tile_queries, head_dim]
    float2* stats;       // [ranges + sequences * heads, tile_queries]: peak (log2), sum
    u32* arrivals;       // [sequences * heads], zero between launches
    int table_stride, ranges;
    float scale_log2;    // softmax scale * log2(e), times the unit of scores
    int window;          // 0: none
};

// A piece in the terms of the kernel.
struct Work {
    Piece piece;
    int head, first_query, tiles;

    DEVICE explicit Work(const Piece& p) : piece(p), head(p.head / query_tiles), first_query(p.head % query_tiles * query_tile) {
        const int tokens = min(p.blocks * block_tokens, p.length - p.first_block * block_tokens);
        tiles = (tokens + tile - 1) / tile;
    }
};

// Asynchronous copies of this warp's tiles, `stages - 1` ahead of their use.
struct Feed {
    u32 ring, scales, barriers;  // shared addresses
    u32 phases;                  // a bit a stage: which phase of its barrier comes next
    int fill, drain;             // stages
    int next, block;             // the tile to fetch next, and where it lies in the arena

    DEVICE Feed(u32 memory, int warp)
        : ring(memory + warp * stages * stage_bytes),
          scales(memory + scales_at + warp * stages * 4 * scale_bytes),
          barriers(memory + barriers_at + warp * stages * 8),
          phases(0) {
        if (threadIdx.x % 32 == 0)
            for (int i = 0; i < stages; i++) create_barrier(barriers + 8 * i);
        publish_barriers();
        __syncwarp();
    }

    DEVICE void look_up(const Arguments& a, const Work& s) {
        if (next < s.tiles)
            block = __ldg(a.tables + (u64)s.piece.sequence * a.table_stride + s.piece.first_block + u32(next) / tiles_per_block);
    }

    DEVICE void fetch(const Arguments& a, const Work& s, int token, int valid) const {
        const int lane = threadIdx.x & 31, row = s.head * block_tokens + token;
        const u32 to = ring + fill * stage_bytes;
        const u8* from = a.cache + (u64)u32(block) * block_bytes;
        if constexpr (has_bulk_copies) {
            if (lane == 0) {
                const u32 barrier = barriers + 8 * fill;
                const int at = a.cache_row + block * (block_bytes / 128) + row * row_bytes / 128;
                expect_bytes(barrier, stage_bytes);
                copy_box(to, a.map, at + k_codes / 128, barrier);
                copy_box(to + v_at, a.map, at + v_codes / 128, barrier);
            }
        } else {
            for (int n = lane; n < v_at / 16; n += 32) {
                const u8* piece = from + row * row_bytes + n * 16;
                copy16(to + swizzled(n * 16), piece + k_codes);
                copy16(to + v_at + swizzled(n * 16), piece + v_codes);
            }
        }
        if constexpr (coded) {  // what lies past the end is not even defined: its scales are read as zero
            constexpr int each = coded ? scale_bytes / 16 : 1, all = 4 * each;  // 16-byte pieces: of a frame, of all
            const u8* scale_row = from + row * groups * 2;
#pragma unroll
            for (int i = 0; i < (all + 31) / 32; i++) {
                const int n = i * 32 + lane, which = n / each, piece = n % each;
                const int frame = which == 0 ? k_scales : which == 1 ? k_biases : which == 2 ? v_scales : v_biases;
                if (all % 32 && n >= all) continue;
                copy16(scales + fill * 4 * scale_bytes + n * 16, scale_row + (frame + piece * 16),
                       valid * groups * 2 - piece * 16);
            }
        }
    }

    DEVICE void advance(const Arguments& a, const Work& s) {
        if (next < s.tiles) {
            const int token = u32(next) % tiles_per_block * tile;
            fetch(a, s, token, s.piece.length - (s.piece.first_block * block_tokens + next * tile));
            next += warps;
            look_up(a, s);
        }
        close_copies();
        fill = fill + 1 == stages ? 0 : fill + 1;
    }

    DEVICE void begin(const Arguments& a, const Work& s, int warp) {
        fill = drain = 0;
        next = warp;
        look_up(a, s);
        for (int i = 0; i < stages - 1; i++) advance(a, s);
    }

    // Until the stage to drain is there; `valid` of its tokens exist.
    DEVICE void wait(int valid) {
        wait_copies<stages - 2>();
        if constexpr (has_bulk_copies) wait_barrier(barriers + 8 * drain, phases >> drain & 1);
        phases ^= 1u << drain;
        __syncwarp();
        if (!coded && valid < tile) {  // probability 0 times an undefined value must be 0
            const u32 values = ring + drain * stage_bytes + v_at;
            for (int n = valid * row_bytes / 4 + threadIdx.x % 32; n < v_at / 4; n += 32)
                asm volatile("st.shared.b32 [%0], 0;" ::"r"(values + swizzled(n * 4)) : "memory");
            order_before_bulk();
            __syncwarp();
        }
    }
    DEVICE u32 stage() const { return ring + drain * stage_bytes; }
    DEVICE u32 stage_scales() const { return scales + drain * 4 * scale_bytes; }
    DEVICE void release() { drain = drain + 1 == stages ? 0 : drain + 1; }
};
