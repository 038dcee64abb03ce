// Who does what, decided once a step by `decode_plan` and read by every layer's attention.
//
// The (sequence, head, block) units of a batch lie in one row, which is cut into equal ranges, one a thread block;
// beginning a head costs as much as a few units and is counted as such. The cut depends on lengths alone, and so do the
// results: a head that lies in several ranges is added up in their order, a slice of it by each of them.
#pragma once
#include "primitives.cuh"

struct Range {
    int begin, end;
};

// What one range has of one head.
struct __align__(16) Piece {
    int sequence, head;       // head: kv head * query tiles + query tile
    int length, first_block;  // of the sequence; the first of the piece's blocks in it
    int blocks;               // 0: there is nothing to do
    int first_range, pieces;  // ranges that share this head: `pieces` of them from first_range on
    int next;                 // the range's next piece, or -1
};

// The plan: a header, then the first piece of each range, then a piece for each head that begins inside a range, then
// the sequences without tokens.
struct __align__(16) Header {
    int empty, unused[3];
};

DEVICE Piece load_piece(const Header* plan, int index) {
    const uint4* from = reinterpret_cast<const uint4*>(plan + 1) + 2 * index;
    const uint4 a = load_fresh(from), b = load_fresh(from + 1);
    return {int(a.x), int(a.y), int(a.z), int(a.w), int(b.x), int(b.y), int(b.z), int(b.w)};
}

// Blocks that the queries of a sequence see: from the first key of the first row's window to the last key.
DEVICE Range visible_blocks(int length, int rows, int window, int block_tokens) {
    const int first = window > 0 ? max(length - rows + 1 - window, 0) : 0;
    return {first / block_tokens, (length + block_tokens - 1) / block_tokens};
}
