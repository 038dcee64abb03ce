// From the arena into shared memory: each warp keeps its own ring of tiles filled.
#pragma once
#include "decode_shape.cuh"
#include "schedule.cuh"

struct Arguments {
    const u16* q;        // [sequences * rows, kv_heads * heads_per_kv, head_dim]
    const u8* cache;     // one layer of the arena: [blocks, block_bytes]
    const int* tables;   // [sequences, table_stride]
    const Header* plan;  // what decode_plan wrote
    u16* out;            // as q
    float* partials;     // [max_ranges + sequences * heads, tile_queries, head_dim]
    float2* stats;       // [max_ranges + sequences * heads, tile_queries]: peak (log2), sum
    u32* arrivals;       // [1 + sequences * heads], zero between launches; the first counts small ranges
    int table_stride, max_ranges;
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
    u32 ring;        // shared address
    int fill, drain; // byte offsets of stages in the ring
    int next, block; // the tile to fetch next, and where it lies in the arena

    DEVICE void look_up(const Arguments& a, const Work& s) {
        if (next < s.tiles)
            block = __ldg(a.tables + (u64)s.piece.sequence * a.table_stride + s.piece.first_block + u32(next) / tiles_per_block);
    }

    template <bool whole>
    DEVICE void fetch(const Arguments& a, const Work& s, int token, int valid) const {
        const int lane = threadIdx.x & 31;
        const u32 to = ring + fill;
        const u8* from = a.cache + (u64)u32(block) * block_bytes;
        const int first_row = s.head * block_tokens + token;
        const u8* row = from + (first_row * row_bytes + lane * 16);
        constexpr int pieces = tile * chunks;  // of 16 bytes, in the K rows of a tile
        repeat<(pieces + 31) / 32>([&](auto i) {
            constexpr int first = 32 * i.value, at = first * 16;
            const int n = first + lane;
            if (pieces % 32 && n >= pieces) return;
            if constexpr (32 % chunks == 0) {  // all lanes step from row to row together
                const u32 lane_to = to + lane / chunks * pitch + lane % chunks * 16;
                copy_both<whole, first / chunks * pitch, at>(lane_to, row, valid * row_bytes - n * 16);
            } else {
                copy_both<whole, 0, at>(to + n / chunks * pitch + n % chunks * 16, row, valid * row_bytes - n * 16);
            }
        });
        if constexpr (coded) {
            constexpr int each = coded ? scale_bytes / 16 : 1, all = 4 * each;  // 16-byte pieces: of a frame, of all
            const u8* scale_row = from + first_row * groups * 2;
#pragma unroll
            for (int i = 0; i < (all + 31) / 32; i++) {
                const int n = i * 32 + lane, which = n / each, piece = n % each;
                const int frame = which == 0 ? k_scales : which == 1 ? k_biases : which == 2 ? v_scales : v_biases;
                if (all % 32 && n >= all) continue;
                const u8* source = scale_row + (frame + piece * 16);
                if constexpr (whole) copy16<scales_at, 0>(to + n * 16, source);
                else copy16<scales_at, 0>(to + n * 16, source, valid * groups * 2 - piece * 16);
            }
        }
    }

    // The same piece of the K rows and of the V rows.
    template <bool whole, int to_offset, int from_offset>
    DEVICE static void copy_both(u32 to, const u8* from, int valid) {
        if constexpr (whole) {
            copy16<to_offset, k_codes + from_offset>(to, from);
            copy16<v_at + to_offset, v_codes + from_offset>(to, from);
        } else {
            copy16<to_offset, k_codes + from_offset>(to, from, valid);
            copy16<v_at + to_offset, v_codes + from_offset>(to, from, valid);
        }
    }

    DEVICE void advance(const Arguments& a, const Work& s) {
        if (next < s.tiles) {
            const int token = u32(next) % tiles_per_block * tile;
            const int valid = s.piece.length - (s.piece.first_block * block_tokens + next * tile);
            if (valid >= tile) fetch<true>(a, s, token, tile);
            else fetch<false>(a, s, token, valid);  // what lies past the end is not even defined: read as zero
            next += warps;
            look_up(a, s);
        }
        close_copies();
        fill = fill + stage_bytes == stages * stage_bytes ? 0 : fill + stage_bytes;
    }

    DEVICE void begin(const Arguments& a, const Work& s, int warp) {
        fill = drain = 0;
        next = warp;
        look_up(a, s);
        for (int i = 0; i < stages - 1; i++) advance(a, s);
    }
};
