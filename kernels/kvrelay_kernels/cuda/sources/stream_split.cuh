// How the weight of a product is cut evenly among thread blocks, whatever that cuts, and how the pieces of a tile meet.
//
// A tile is so many rows of the weight, a unit so many columns of a tile. Units are numbered tile by tile, and block b of
// G takes those from b * total / G to where block b + 1 begins. A tile in several pieces is added up in the order of its
// columns by the thread block that comes last. So a result depends on the sizes of weight and tile and on G alone.
// Source: Stream-K (Osama et al., 2023). A block's last piece, which its neighbour completes, comes first of all: so that
// where there are whole tiles, pieces meet before the end, while more of the weight is on its way.
//
//     const Split split(tiles, units);
//     for (Piece piece = split.first(); !piece.none(); piece = split.next(piece)) {
//         ...                                         // sums of units piece.begin to piece.end of tile piece.tile
//         if (add_up<threads>(sums, split, piece, at)) ...  // writes the tile's result
//     }
//
// The launcher gives at most as many blocks as there are units, 2 * G * threads * count floats of workspace, and a counter
// for each tile, zero before the first launch and again after each. Launches that share them follow each other.
#pragma once
#include "warpgroup.cuh"

// Units `begin` to `end` of a tile.
struct Piece {
    int tile, begin, end;
    DEVICE bool none() const { return begin == end; }
};

struct Split {
    int units, total;       // of a tile, of all tiles
    int start, late, stop;  // units of this block: its first, the first of its last piece, the one behind it

    DEVICE Split(int tiles, int units)
        : units(units), total(tiles * units), start(start_of(blockIdx.x)), stop(start_of(blockIdx.x + 1)) {
        late = max(start, (stop - 1) / units * units);
    }
    DEVICE int start_of(int block) const { return u64(block) * total / gridDim.x; }
    DEVICE int block_of(int unit) const { return (u64(unit + 1) * gridDim.x - 1) / total; }
    DEVICE Piece piece(int unit, int end) const {
        const int tile = unit / units, begin = unit - tile * units;
        return {tile, begin, min(units, begin + end - unit)};
    }
    DEVICE Piece first() const { return piece(late, stop); }
    DEVICE Piece next(const Piece& done) const {
        const int unit = done.tile * units + done.end;
        return piece(unit == stop ? start : unit, late);
    }
};

// Where the pieces of a tile meet.
struct Meeting {
    float4* sums;   // [2 G][count / 4][threads]: of each block, the tile that it begins within, and the one it ends within
    u32* arrivals;  // [tiles]
    u32 verdict;    // shared address of a word
    int thread;     // of `threads` that hold sums
    int barrier;    // named barrier of these threads
};

// What `threads` threads of a block have of a piece's sums, `count` each, becomes that of the whole tile: true for the
// block that has it then. Every block gives the same thread the same place in the tile. A thread has up to `asked`
// vectors on their way at once.
template <int threads, int asked = 16, int count>
DEVICE bool add_up(float (&sums)[count], const Split& split, const Piece& piece, const Meeting& at) {
    if (piece.end - piece.begin == split.units) return true;
    static_assert(count % 4 == 0, "sums move as vectors");
    constexpr int vectors = count / 4;
    constexpr int ahead = vectors < asked ? asked / vectors : 1;  // pieces that are asked for at once: each costs a latency
    const int first = split.block_of(piece.tile * split.units), last = split.block_of((piece.tile + 1) * split.units - 1);
    const auto sums_of = [&](int block) {
        return at.sums + u64(2 * block + (block == first)) * (vectors * threads) + at.thread;
    };
    float4* mine = sums_of(blockIdx.x);
#pragma unroll
    for (int v = 0; v < vectors; v++)
        mine[v * threads] = {sums[4 * v], sums[4 * v + 1], sums[4 * v + 2], sums[4 * v + 3]};
    meet(at.barrier, threads);
    if (at.thread == 0) {
        const u32 others = last - first;
        store_shared(at.verdict, arrive(at.arrivals + piece.tile, others) == others);
    }
    meet(at.barrier, threads);
    if (!load_shared(at.verdict)) return false;
#pragma unroll
    for (int i = 0; i < count; i++) sums[i] = 0;
    for (int block = first; block <= last; block += ahead) {
        float4 part[ahead][vectors];
#pragma unroll
        for (int a = 0; a < ahead; a++) {
            const float4* from = sums_of(min(block + a, last));
#pragma unroll
            for (int v = 0; v < vectors; v++) part[a][v] = load_fresh(from + v * threads);
        }
#pragma unroll
        for (int a = 0; a < ahead; a++) {
            if (block + a > last) continue;
#pragma unroll
            for (int v = 0; v < vectors; v++) {
                sums[4 * v] += part[a][v].x, sums[4 * v + 1] += part[a][v].y;
                sums[4 * v + 2] += part[a][v].z, sums[4 * v + 3] += part[a][v].w;
            }
        }
    }
    return true;
}
