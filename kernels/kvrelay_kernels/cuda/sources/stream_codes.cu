// x @ weight.T for 1 to 64 rows of x and a weight of 4- or 8-bit codes, at the speed of reading the codes.
//
// Codes pass through a ring in shared memory into registers, become the matrix rounded to halves there, and are operand of
// Hopper's warpgroup instruction; x, in halves too, is the other one. So a weight costs the same few instructions whatever
// the number of rows. A band of weight rows belongs to one thread block, or its columns in equal parts to those of a
// cluster; of a narrow band, several groups of warps take units by turns. All of these add up their sums in each other's
// shared memory, in order: it depends on the weight's sizes and the device alone, and a row has the same bits in any
// company.
#include "stream_ring.cuh"
#include "stream_write.cuh"

constexpr int count = columns / 2;  // sums of a thread
#if CLUSTER > 1
#define TOGETHER __cluster_dims__(CLUSTER, 1, 1)
#else
#define TOGETHER
#endif

// Sums times what x was multiplied with in this unit, or with its inverse.
DEVICE void scale_sums(float (&sums)[count], u32 powers, bool inverse) {
#pragma unroll
    for (int i = 0; i < count; i++) {
        const float power = __uint_as_float(load_shared(powers + (i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2) * 4));
        sums[i] *= inverse ? inverse_power(power) : power;
    }
}

// Products run while the next unit becomes operands: two sets of them, where a stage has an even number of units. With 64
// rows the compiler lacks registers for that, and would let no two products follow each other.
constexpr int group_units = stage_units / groups;  // of a stage
constexpr int sets = group_units % 2 || columns == 64 ? 1 : 2;
using Operands = u32[sets][unit_steps][4];

// Begins to add the products of a group's units of a stage with one tile; `done` is called when those of the stage before
// are added.
template <class Done>
DEVICE void add_stage(float (&sums)[count], Operands& a, const Ring& ring, const Place& turn, int tile, int group, Done done) {
    const u32 stage = ring.stage(turn), pair = tile / pair_tiles * stage_units, at = tile % pair_tiles;
    const u32 codes = stage + codes_at + (pair + group) * pair_code_bytes + at * unit_code_bytes;
    const u32 factors = stage + factors_at + (pair + group) * pair_factor_bytes + at * unit_factor_bytes;
    const bool scaled = bfloat && ring.any_power(turn);  // x was multiplied with powers of two
    const u64 x = describe(stage, 0, 1024) + group * moved(x_unit_bytes);
#pragma unroll
    for (int i = 0; i < group_units; i++) {
        const int u = i * groups;  // and `group` more
        HalfUnit unit;
        unit.load(codes + u * pair_code_bytes, factors + u * pair_factor_bytes);
        if constexpr (sets == 1) wait_products<0>();
        u32(&mine)[unit_steps][4] = a[i % sets];
#pragma unroll
        for (int s = 0; s < unit_steps; s++) unit.operand(mine[s], s);
        if (scaled) {
            wait_products<0>();
            hold(sums);
            scale_sums(sums, ring.power(turn, u + group, 0), false);
        }
        hold(sums);
        open_products();
#pragma unroll
        for (int s = 0; s < unit_steps; s++) multiply_halves(sums, mine[s], x + moved(u * x_unit_bytes + s * 32));
        close_products();
        hold(sums);
        if (scaled) {
            wait_products<0>();
            hold(sums);
            scale_sums(sums, ring.power(turn, u + group, 0), true);
        }
        wait_products<1>();
        hold(sums);
        if (i == 0) done();
    }
}

constexpr bool shared_sums = groups > 1 || cluster > 1;
constexpr int fragments = tiles * columns / 8;  // eight rows of x by a tile
DEVICE void meet_holders() {
    if constexpr (cluster > 1) meet_cluster();
    else __syncthreads();
}

// The sums of groups and of a cluster's thread blocks go where the ring was; each block adds up every `cluster`-th
// fragment. All threads come here.
template <class Write>
DEVICE void add_up(const float (&sums)[count], float4* area, int warp, Write write) {
    const int lane = threadIdx.x & 31, tile = warp % tile_warps;
    __syncthreads();  // all have done with the ring
    if (warp < consumer_warps && tile < tiles)
#pragma unroll
        for (int j = 0; j < columns / 8; j++)
            area[(warp / tile_warps * fragments + j * tiles + tile) * 32 + lane] =
                {sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]};
    meet_holders();
    if (warp < consumer_warps)
        for (int n = warp * cluster + (cluster > 1 ? cluster_rank() : 0); n < fragments; n += consumer_warps * cluster) {
            float total[4] = {};
#pragma unroll
            for (int r = 0; r < cluster; r++) {
                float4 parts[groups];
#pragma unroll
                for (int g = 0; g < groups; g++) {
                    const float4* from = area + (g * fragments + n) * 32 + lane;
                    parts[g] = cluster > 1 ? load_remote(from, r) : *from;
                }
#pragma unroll
                for (int g = 0; g < groups; g++)
                    total[0] += parts[g].x, total[1] += parts[g].y, total[2] += parts[g].z, total[3] += parts[g].w;
            }
            write(total, n % tiles, n / tiles);
        }
    if constexpr (cluster > 1) part_cluster();  // nobody leaves while others read its memory
}

// x: [rows, k], or what `halve_rows` made of it; of_rows: scales, of a weight that has one a row; bias: 16-bit elements, or null; unit: the weight's.
extern "C" __global__ void TOGETHER __launch_bounds__(all_threads, 1)
stream_codes(const void* x, const __grid_constant__ TensorMap codes, const __grid_constant__ TensorMap factors,
             const Factors* of_rows, const u16* bias, int rows, int n, int k, float unit, Out* out) {
    release_dependents();
    extern __shared__ __align__(1024) u8 memory[];
    const Ring ring{shared_address(memory)};
    if (threadIdx.x == 0) ring.create();
    __syncthreads();
    const Share share(n, k);
    const int warp = __shfl_sync(every_lane, threadIdx.x / 32, 0);  // tells the compiler: the same for all lanes
    const auto write = [&](int band, float (&sums)[4], int tile, int j) {
        const int first = (band * tiles + tile) * tile_rows, row = first + threadIdx.x % 32 / 4;
#pragma unroll
        for (int i = 0; i < 4; i++) sums[i] *= unit * code_unit * row_scale(of_rows, min(row + i / 2 * 8, n - 1));
        write_eight(sums, bias, out, rows, n, first, n, j);
    };
    float sums[count];
    if (warp < consumer_warps) {
        await_producers();
        Operands operands;
        Place turn;
        for (int band = blockIdx.x / cluster; band < share.bands; band += share.step) {
#pragma unroll
            for (float& sum : sums) sum = 0;
            Place late;
            for (int at = share.begin; at < share.end; at += stage_units) {
                wait_barrier(ring.full(turn), turn.phase);
                add_stage(sums, operands, ring, turn, min(warp % tile_warps, tiles - 1), warp / tile_warps, [&] {
                    if (at > share.begin && threadIdx.x % 32 == 0) arrive_at(ring.empty(late));
                });
                late = turn;
                turn.next();
            }
            wait_products<0>();
            hold(sums);
            if (threadIdx.x % 32 == 0) arrive_at(ring.empty(late));
            if constexpr (!shared_sums) {
#pragma unroll
                for (int j = 0; j < columns / 8; j++)
                    if (warp < tiles && 8 * j < rows) {
                        float part[4] = {sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]};
                        write(band, part, warp, j);
                    }
            }
        }
    } else if (warp == consumer_warps) {
        if (threadIdx.x % 32 == 0) StageFeed{ring, share, codes, factors, x}.run_all();
    } else if constexpr (!prepared) {
        await_producers();
        const int taker = warp - consumer_warps - 1;
        RowFeed(ring, share, static_cast<const u16*>(x), rows, k, taker).run_all(taker);
    }
    __syncwarp();
    if constexpr (shared_sums)
        add_up(sums, reinterpret_cast<float4*>(memory), warp, [&](float (&total)[4], int tile, int j) {
            if (8 * j < rows) write(blockIdx.x / cluster, total, tile, j);
        });
}
