// The plan of a step's attention (schedule.cuh), from the lengths that lie on the device. One thread block.
#include "schedule.cuh"

constexpr int block_tokens = 64;
constexpr int threads = 512;

// lengths [sequences] -> plan: Header, Piece [ranges + sequences * heads], int [sequences].
// heads: kv heads * query tiles. begin_cost: what beginning a head costs, in units.
extern "C" __global__ void __launch_bounds__(threads)
decode_plan(const int* lengths, int sequences, int rows, int window, int heads, int ranges, int begin_cost, Header* plan) {
    release_dependents();
    await_producers();
    extern __shared__ int firsts[];  // cost before each sequence, and of all
    Piece* pieces = reinterpret_cast<Piece*>(plan + 1);
    int* empty = reinterpret_cast<int*>(pieces + ranges + sequences * heads);

    if (threadIdx.x < 32) {
        const int lane = threadIdx.x;
        int total = 0, empties = 0;
        for (int base = 0; base < sequences; base += 32) {
            const int s = base + lane;
            const Range seen = visible_blocks(s < sequences ? lengths[s] : 0, rows, window, block_tokens);
            int sum = seen.end > seen.begin ? (seen.end - seen.begin + begin_cost) * heads : 0;
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
        if (lane == 0) firsts[0] = 0, plan->empty = empties;
    }
    __syncthreads();

    const int share = firsts[sequences] / ranges, extra = firsts[sequences] % ranges, wide = extra * (share + 1);
    const auto range_at = [&](int index) {
        const int begin = index * share + min(index, extra);
        return Range{begin, begin + share + (index < extra)};
    };
    const auto owner = [&](int at) { return at < wide ? at / (share + 1) : extra + (at - wide) / share; };
    const auto cost_of = [&](int s) { return (firsts[s + 1] - firsts[s]) / heads; };  // of a head
    // The piece that range `index` has of a head, written to `slot`; without blocks if the range ends before the first.
    const auto write = [&](int slot, int index, int s, int head) {
        const Range range = range_at(index);
        const int count = cost_of(s) - begin_cost, first = firsts[s] + head * cost_of(s) + begin_cost;
        const int begin = max(range.begin - first, 0), end = min(range.end - first, count);
        Piece piece;
        piece.sequence = s, piece.head = head, piece.length = lengths[s];
        piece.first_block = visible_blocks(piece.length, rows, window, block_tokens).begin + begin;
        piece.blocks = max(end - begin, 0);
        piece.first_range = owner(first), piece.pieces = owner(first + count - 1) - piece.first_range + 1;
        piece.next = -1;
        int next_s = s, next_head = head + 1;
        if (next_head == heads) {
            next_head = 0;
            do next_s++;
            while (next_s < sequences && firsts[next_s + 1] == firsts[next_s]);
        }
        if (next_s < sequences && firsts[next_s] + next_head * cost_of(next_s) + begin_cost < range.end)
            piece.next = ranges + next_s * heads + next_head;
        pieces[slot] = piece;
    };
    for (int r = threadIdx.x; r < ranges; r += threads) {
        const Range range = range_at(r);
        if (range.begin == range.end) {
            pieces[r] = {0, 0, 0, 0, 0, 0, 0, -1};
            continue;
        }
        int low = 0, high = sequences;  // firsts[low] <= range.begin < firsts[high]
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (firsts[middle] <= range.begin) low = middle;
            else high = middle;
        }
        write(r, r, low, (range.begin - firsts[low]) / cost_of(low));
    }
    for (int h = threadIdx.x; h < sequences * heads; h += threads) {
        const int s = h / heads;
        if (firsts[s + 1] == firsts[s]) continue;
        write(ranges + h, owner(firsts[s] + h % heads * cost_of(s) + begin_cost), s, h % heads);
    }
}
