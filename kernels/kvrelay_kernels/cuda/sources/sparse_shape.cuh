// How the Hopper kernel lays out shared memory, and what its warps tell each other there.
#pragma once
#include "sparse_work.cuh"
#include "turn.cuh"
#include "warpgroup.cuh"

constexpr int no_block = -1;     // lies outside of the cache: the copy engine writes zeros

constexpr int step = head_dim > 128 ? 64 : 128;  // keys of one step
constexpr int steps_per_tile = mask_tile / step;
constexpr int k_stages = head_dim > 64 ? 2 : 4;  // steps of K in shared memory
constexpr int v_stages = head_dim > 64 ? 3 : 4;  // of V: they come a step later, and stay longer
constexpr int slots = head_dim > 128 ? 1 : 2;    // query tiles in shared memory
constexpr int multipliers = 2;                   // warpgroups of 64 query rows
constexpr int columns = head_dim > 128 ? 128 : head_dim;  // of the output in one product
constexpr int outputs = head_dim / columns;

constexpr int query_panel = mask_tile * 128;
constexpr int key_panel = step * 128;
constexpr int query_bytes = panels * query_panel;
constexpr int key_bytes = panels * key_panel;
constexpr int unit = 8 * 128;  // eight rows of a panel

constexpr int keys_at = slots * query_bytes;
constexpr int values_at = keys_at + k_stages * key_bytes;
constexpr int control_at = values_at + v_stages * key_bytes;

struct Arguments {
    const u16* q;       // [rows, heads, head_dim]
    u16* out;           // as q
    const void* k_map;  // of [blocks, kv_heads, 64, head_dim], for the copy engine
    const void* v_map;
    const int* tables;
    const Item* items;  // the longest first
    const int* list;
    const int* low;     // [rows]: the first key that a row sees behind the prefix
    u32* counter;       // work taken so far; zero between launches
    int count;          // of items
    int first_block;    // of this layer in the maps
    float scale_log2;
};

// What the roles tell each other.
struct Control {
    u64 k_full[k_stages], k_empty[k_stages], v_full[v_stages], v_empty[v_stages];
    u64 item_known[slots], q_full[slots], slot_empty[slots];
    int entries[k_stages];  // of the K stages
    Item items[slots];    // tiles < 0: there is no more work
    int heads[slots];
    int low[slots][mask_tile];
};
constexpr int control_bytes = 2048;
static_assert(sizeof(Control) <= control_bytes, "the launcher asks for less shared memory than that");
