// Who does what: all (sequence, head, block) units of a batch in one row, cut into equal ranges, one a thread block.
//
// A range may begin or end inside a head's blocks; the pieces of such a head are partial results that the last thread
// block to arrive adds up in order, so that the outcome does not depend on who that was.
#pragma once
#include "primitives.cuh"

struct Range {
    int begin, end;
};

// Unit ranges differ by one unit at most; `share` is the smaller size, the first `extra` ranges have one more.
struct Cut {
    int share, extra;

    DEVICE Cut(int units, int ranges) : share(divide(units, ranges)), extra(units - share * ranges) {}
    DEVICE Range range(int index) const {
        const int begin = index * share + min(index, extra);
        return {begin, begin + share + (index < extra)};
    }
    DEVICE int owner(int unit) const {
        const int wide = extra * (share + 1);
        return unit < wide ? divide(unit, share + 1) : extra + divide(unit - wide, share);
    }
};

// Blocks that the queries of a sequence see: from the first key of the first row's window to the last key.
DEVICE Range visible_blocks(int length, int rows, int window, int block_tokens) {
    const int first = window > 0 ? max(length - rows + 1 - window, 0) : 0;
    return {first / block_tokens, (length + block_tokens - 1) / block_tokens};
}

// firsts[s] = units before sequence s, with the total at the end, and a copy of the lengths; one warp.
DEVICE void count_units(int* firsts, int* near_lengths, const int* lengths, int sequences,
                        int rows, int window, int tokens, int heads) {
    const int lane = threadIdx.x & 31;
    int total = 0;
    for (int base = 0; base < sequences; base += 32) {
        const int s = base + lane;
        const int length = s < sequences ? lengths[s] : 0;
        const Range blocks = visible_blocks(length, rows, window, tokens);
        int sum = s < sequences ? (blocks.end - blocks.begin) * heads : 0;
        for (int step = 1; step < 32; step *= 2) {
            const int before = __shfl_up_sync(every_lane, sum, step);
            sum += lane >= step ? before : 0;
        }
        if (s < sequences) firsts[s + 1] = total + sum, near_lengths[s] = length;
        total += __shfl_sync(every_lane, sum, 31);
    }
    if (lane == 0) firsts[0] = 0;
}

// The sequence that unit belongs to: a warp looks at 32 sequences at once.
DEVICE int find_sequence(const int* firsts, int sequences, int unit) {
    const int lane = threadIdx.x & 31;
    int found = 0;
    for (int base = 0; base < sequences; base += 32) {
        const int s = base + lane;
        const u32 past = __ballot_sync(every_lane, s < sequences && firsts[s + 1] <= unit);
        found += __popc(past);
        if (past != every_lane) break;
    }
    return found;
}
