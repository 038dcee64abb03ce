// The plan of a step's attention (schedule.cuh), from the lengths that lie on the device. One thread block.
#include "schedule.cuh"

constexpr int block_tokens = 64;
constexpr int threads = 512;

// Ranges of three sizes: two large ones a thread block, then small ones for whoever is free.
struct Ranges {
    int blocks;
    Cut first, second, small;

    DEVICE Ranges(int units, int blocks, int small_ranges, int first_part, int second_part)
        : blocks(blocks),
          first(0, small_ranges ? units / 1024 * first_part : units, blocks),
          second(small_ranges ? units / 1024 * first_part : units, small_ranges ? units / 1024 * second_part : 0, blocks),
          small(small_ranges ? units / 1024 * (first_part + second_part) : units,
                small_ranges ? units - units / 1024 * (first_part + second_part) : 0, small_ranges) {}
    DEVICE Range range(int index) const {
        if (index < blocks) return first.range(index);
        if (index < 2 * blocks) return second.range(index - blocks);
        return small.range(index - 2 * blocks);
    }
    DEVICE int owner(int unit) const {
        if (unit < second.start) return first.owner(unit);
        if (unit < small.start) return blocks + second.owner(unit);
        return 2 * blocks + small.owner(unit);
    }
};

// lengths [sequences] -> plan: Header, Piece [max_ranges + sequences * heads], int [sequences].
// heads: kv heads * query tiles. Batches of fewer than small_from units a thread block get one range each; larger ones
// first_part and second_part (of 1024) in large ranges, and the rest in max_ranges - 2 * blocks small ones.
extern "C" __global__ void __launch_bounds__(threads)
decode_plan(const int* lengths, int sequences, int rows, int window, int heads, int blocks, int max_ranges,
            int small_from, int first_part, int second_part, Header* plan) {
    extern __shared__ int firsts[];  // units before each sequence, and after the last
    Piece* pieces = reinterpret_cast<Piece*>(plan + 1);
    int* empty = reinterpret_cast<int*>(pieces + max_ranges + sequences * heads);

    if (threadIdx.x < 32) {
        const int lane = threadIdx.x;
        int total = 0, empties = 0;
        for (int base = 0; base < sequences; base += 32) {
            const int s = base + lane;
            const Range seen = visible_blocks(s < sequences ? lengths[s] : 0, rows, window, block_tokens);
            int sum = (seen.end - seen.begin) * heads;
            const u32 none = __ballot_sync(every_lane, s < sequences && sum == 0);
            if (none >> lane & 1) empty[empties + __popc(none & ((1u << lane) - 1))] = s;
            empties += __popc(none);
            for (int step = 1; step < 32; step *= 2) {
                const int before = __shfl_up_sync(every_lane, sum, step);
                sum += lane >= step ? before : 0;
            }
            if (s < sequences) firsts[s + 1] = total + sum;
            total += __shfl_sync(every_lane, sum, 31);
        }
        if (lane == 0) firsts[0] = 0, plan->empty = empties, plan->units = total;
    }
    __syncthreads();

    const int units = firsts[sequences];
    const int small_ranges = units >= small_from * blocks ? max_ranges - 2 * blocks : 0;
    const Ranges ranges(units, blocks, small_ranges, first_part, second_part);
    const int used = small_ranges ? max_ranges : blocks;
    if (threadIdx.x == 0) plan->small_ranges = small_ranges;

    const auto sequence_of = [&](int unit) {
        int low = 0, high = sequences;  // firsts[low] <= unit < firsts[high]
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (firsts[middle] <= unit) low = middle;
            else high = middle;
        }
        return low;
    };
    const auto head_at = [&](int unit) {
        const int s = sequence_of(unit), blocks_of = (firsts[s + 1] - firsts[s]) / heads;
        return s * heads + (unit - firsts[s]) / blocks_of;
    };
    const auto write = [&](int index, int unit, const Range& range) {
        const int s = sequence_of(unit), count = (firsts[s + 1] - firsts[s]) / heads;
        const int head = (unit - firsts[s]) / count, begin = firsts[s] + head * count, end = begin + count;
        const int stop = min(end, range.end), owner = ranges.owner(begin);
        Piece piece;
        piece.sequence = s, piece.head = head, piece.length = lengths[s];
        piece.first_block = visible_blocks(piece.length, rows, window, block_tokens).begin + unit - begin;
        piece.blocks = stop - unit;
        piece.first_range = owner, piece.pieces = ranges.owner(end - 1) - owner + 1;
        piece.next = stop < range.end ? max_ranges + head_at(stop) : -1;
        pieces[index] = piece;
    };
    for (int r = threadIdx.x; r < max_ranges; r += threads) {
        const Range range = r < used ? ranges.range(r) : Range{0, 0};
        if (range.begin < range.end) write(r, range.begin, range);
        else pieces[r] = {0, 0, 0, 0, 0, 0, 0, -1};
    }
    for (int h = threadIdx.x; h < sequences * heads; h += threads) {
        const int s = h / heads, count = (firsts[s + 1] - firsts[s]) / heads;
        if (count == 0) continue;
        const int unit = firsts[s] + h % heads * count;
        const Range range = ranges.range(ranges.owner(unit));
        if (unit > range.begin) write(max_ranges + h, unit, range);
    }
}
