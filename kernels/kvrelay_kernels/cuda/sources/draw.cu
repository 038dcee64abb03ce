// The token of each row: the likeliest, or one drawn as `model_runtime.sampler` draws it. A thread block a row.
//
// All there is to find is where a running sum over the tokens in order, likeliest first, passes a number: a count for
// the top k, a mass for the top p and for the draw itself. The bin in which it does is known from the tally; the tokens
// of that bin are collected, sorted and added up. Of a bin that holds more than the list, the tokens are first parted by
// the leading digits of their order, until few enough are left.
#include "draw.cuh"

constexpr int warps = threads / 32;
constexpr int digit_bits = bins > 512 ? 10 : bins > 32 ? 6 : 5;
static_assert((1 << digit_bits) <= bins && threads <= 1024);

__shared__ u64 mass[bins], list[bins];  // list: orders of tokens; or masses by digit, while a bin is parted
__shared__ u32 count[bins], digit_count[1 << digit_bits];
__shared__ u64 sums[warps], shared_before;
__shared__ int shared_index;
__shared__ u32 listed;
__shared__ double point;
__shared__ int queues[warps][64];

// The sum over all lanes up to this one.
DEVICE u64 sum_up_to(u64 own) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const u64 below = __shfl_up_sync(every_lane, own, step);
        if (lane >= step) own += below;
    }
    return own;
}
// The sum over all threads before this one, and over all.
struct Sums {
    u64 before, all;
};
__noinline__ __device__ Sums sum_before(u64 own) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u64 up_to = sum_up_to(own);
    if (lane == 31) sums[warp] = up_to;
    __syncthreads();
    const u64 of_warp = lane < warps ? sums[lane] : 0, of_warps = sum_up_to(of_warp);
    __syncthreads();
    return {__shfl_sync(every_lane, of_warps - of_warp, warp) + up_to - own, __shfl_sync(every_lane, of_warps, 31)};
}

struct Place {
    int index;
    u64 before;  // the sum of all that come before
};

// The first of n values whose running sum passes `target`, which their sum does. All threads get it.
template <class Value>
DEVICE Place passing(int n, u64 target, Value value) {
    const int share = (n + threads - 1) / threads, begin = threadIdx.x * share, end = min(n, begin + share);
    u64 own = 0;
#pragma unroll 1
    for (int i = begin; i < end; i++) own += value(i);
    u64 before = sum_before(own).before;
    if (before <= target && target < before + own) {
        int i = begin;
        for (u64 next; before + (next = value(i)) <= target; i++) before += next;
        shared_index = i, shared_before = before;
    }
    __syncthreads();
    const Place place = {shared_index, shared_before};
    __syncthreads();
    return place;
}

// The list in order, n of its places taken: a bitonic network (Batcher, 1968).
DEVICE void sort_list(int n) {
    int size = 1;
    while (size < n) size *= 2;
    each_number(n, size, [](int i) { list[i] = 0; });
    __syncthreads();
    for (int run = 2; run <= size; run *= 2) {
        for (int step = run / 2; step > 0; step /= 2) {
            each_number(0, size / 2, [=](int i) {
                const int a = 2 * i - (i & (step - 1)), b = a + step;
                const u64 x = list[a], y = list[b];
                if ((x < y) == ((a & run) == 0)) list[a] = y, list[b] = x;
            });
            __syncthreads();
        }
    }
}

struct Found {
    u64 order;
    u64 sum;  // of all up to it, itself included
    int bin;
};

struct Row {
    const float* logits;
    int vocabulary;
    Weights weights;

    // Calls f(order, weight) for each token of a bin that may be drawn. Few do: the others are told apart by their places
    // alone, and those few wait in a queue until a warp has one for each of its lanes.
    template <class F>
    DEVICE void each(int bin, F f) const {
        constexpr int depth = 16;
        const Scale scale = weights;
        const float low = bin, high = bin + 1;
        const int lane = threadIdx.x % 32;
        int* const queue = queues[threadIdx.x / 32];
        int waiting = 0;
        const auto call = [&](int count) {
            __syncwarp();
            if (lane < count) {
                const int token = queue[lane];
                const float x = logits[token];
                if (const u64 weight = weights.of(x)) f(order_of(x, token), weight);
            }
            __syncwarp();
        };
        for (int base = 0; base < vocabulary; base += depth * threads) {
            const int from = base + threadIdx.x;
            const float* const own = logits + from;
            const auto look = [&](auto there) {
                u32 found = 0;
#pragma unroll
                for (int i = 0; i < depth; i++) {
                    const float place = scale.place(there(i) ? own[i * threads] : -infinity());
                    if (place >= low && place < high) found |= 1u << i;
                }
                return found;
            };
            u32 wanted;
            if (base + depth * threads <= vocabulary) wanted = look([](int) { return true; });
            else wanted = look([=](int i) { return from + i * threads < vocabulary; });
#pragma unroll 1
            while (const u32 some = __ballot_sync(every_lane, wanted != 0)) {
                if (wanted) queue[waiting + __popc(some & ((1u << lane) - 1))] = from + (__ffs(wanted) - 1) * threads;
                wanted &= wanted - 1;
                waiting += __popc(some);
                if (waiting < 32) continue;
                call(32);
                waiting -= 32;
                if (lane < waiting) queue[lane] = queue[32 + lane];
                __syncwarp();
            }
        }
        call(waiting);
    }

    // What the last bin that has tokens weighs anew, when some of its are not drawn any more, and none behind it.
    DEVICE void tally_last(int bin) const {
        each_number(bin, bins, [](int i) { mass[i] = 0, count[i] = 0; });
        __syncthreads();
        each(bin, [=](u64, u64 weight) { add_shared(mass + bin, weight), atomicAdd(count + bin, 1u); });
        __syncthreads();
    }

    // The token at which the running count, or the running mass, passes `target`.
    __noinline__ __device__ Found passes(bool counting, u64 target) const {
        Place place = passing(bins, target, [=](int i) { return counting ? u64(count[i]) : mass[i]; });
        const int bin = place.index;
        u64 before = place.before;
        // Of the bin's tokens those whose order begins with `leading`, above `shift`; all of them do at first.
        const u32 highest = weights.rank_at(bin - 0.5f), lowest = weights.rank_at(bin + 1.5f);
        const auto above = [](u64 order, int shift) { return shift < 64 ? order >> shift : 0; };
        int size = count[bin], shift = 64 - __clz(highest ^ lowest);
        u64 leading = above(u64(highest) << 32, shift);
        const auto leads = [&](u64 order) { return above(order, shift) == leading; };
        while (size > bins) {
            const int last = shift, bits = min(digit_bits, shift), digits = 1 << bits;
            each_number(0, digits, [](int i) { list[i] = 0, digit_count[i] = 0; });
            __syncthreads();
            each(bin, [&](u64 order, u64 weight) {
                if (!leads(order)) return;
                const int digit = digits - 1 - int(order >> (last - bits) & (digits - 1));
                add_shared(list + digit, weight), atomicAdd(digit_count + digit, 1u);
            });
            __syncthreads();
            place = passing(digits, target - before, [=](int i) { return counting ? u64(digit_count[i]) : list[i]; });
            before += place.before, size = digit_count[place.index];
            leading = leading << bits | (digits - 1 - place.index), shift -= bits;
            __syncthreads();
        }
        if (threadIdx.x == 0) listed = 0;
        __syncthreads();
        each(bin, [&](u64 order, u64) {
            if (leads(order)) list[atomicAdd(&listed, 1u)] = order;
        });
        __syncthreads();
        sort_list(size);
        const auto value = [&](int i) { return counting ? 1 : weights.of(logit_of(list[i])); };
        place = passing(size, target - before, value);
        const Found found = {list[place.index], before + place.before + value(place.index), bin};
        __syncthreads();
        return found;
    }
};

template <class Value>
DEVICE u64 total(Value value) {
    u64 own = 0;
    each_number(0, bins, [&](int i) { own += value(i); });
    return sum_before(own).all;
}
DEVICE u64 total_mass() {
    return total([](int i) { return mass[i]; });
}

// The random number in [0, 1) of a position: the first of Philox 4x64-10's first block (Salmon et al., 2011).
DEVICE double uniform(u64 seed, u64 position) {
    u64 a = 1, b = 0, c = 0, d = 0;
#pragma unroll 1
    for (int round = 0; round < 10; round++) {
        constexpr u64 m = 0xd2e7470ee14c6c93ull, n = 0xca5a826395121157ull;
        const u64 high = __umul64hi(n, c) ^ b ^ seed, other = __umul64hi(m, a) ^ d ^ position;
        b = n * c, d = m * a, a = high, c = other;
        seed += 0x9e3779b97f4a7c15ull, position += 0xbb67ae8584caa73bull;
    }
    return double(a >> 11) * 0x1p-53;
}

// The last sum that is not above a share of `mass`: what a running sum has to pass.
DEVICE u64 below(double share, u64 mass) { return min(u64(share * double(mass)), mass - 1); }

DEVICE u64 sampled(Row row, const Draw& draw) {
    u64 kept = total_mass();
    if (draw.top_k > 0 && draw.top_k < total([](int i) { return u64(count[i]); })) {
        // Tokens that tie with the last one are kept as well.
        const Found last = row.passes(true, draw.top_k - 1);
        row.weights.lowest_rank = last.order >> 32;
        row.tally_last(last.bin);
        kept = total_mass();
    }
    if (draw.top_p < 1) {
        // Kept is up to the first token that reaches the share, not only that passes it.
        const double wanted = ceil(draw.top_p * double(kept));
        kept = row.passes(false, min(u64(wanted) - 1, kept - 1)).sum;
    }
    return row.passes(false, below(point, kept)).order;
}

extern "C" __global__ void __launch_bounds__(threads)
draw(const float* logits, const int* places, const int* lengths, const Draw* draws, int vocabulary, int stride,
     int pieces, const u64* firsts, const u64* masses, const u32* counts, u32* seen, int* newest, int* tokens,
     const int* answer) {
    release_dependents();
    const int row = blockIdx.x, place = load_fresh(places + row);
    await_producers();
    if (place < 0) return;
    const Draw& draw = draws[place];
    const u64 first = first_of(firsts + u64(row) * pieces, pieces);
    u64 drawn = first;
    // Where everything is masked there is nothing to sample.
    if (draw.temperature > 0 && first != broken && logit_of(first) > -infinity()) {
        each_number(0, bins, [=](int i) { mass[i] = masses[u64(row) * bins + i], count[i] = counts[u64(row) * bins + i]; });
        if (threadIdx.x == 0) point = uniform(draw.seed, lengths[row]);
        __syncthreads();
        drawn = sampled({logits + u64(row) * vocabulary, vocabulary, Weights(draw, first)}, draw);
    }
    if (threadIdx.x != 0) return;
    const bool finite = first != broken;
    // The next step reads what is newest before the host knows that this row has failed.
    newest[place] = finite ? token_of(drawn) : 0;
    tokens[*answer + row] = finite ? token_of(drawn) : not_finite;
    if (finite && draw.counted) seen[u64(place) * stride + token_of(drawn)]++;
}
