// A cluster of thread blocks, which run by turns: each until all of its threads wait for the others.
#pragma once
#include "shared_memory.h"

namespace host {
// A thread block while another one runs.
struct Member {
    Index index = {};
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Barrier block, gate;
    std::vector<u8> shared;
    std::vector<Groups> groups;
    std::map<u32, BulkBarrier> barriers;
    bool begun, done;

    // In, or out again.
    void trade() {
        std::swap(index, blockIdx), std::swap(block, host::block), std::swap(gate, host::gate);
        fibers.swap(host::fibers), warps.swap(host::warps), groups.swap(host::groups), barriers.swap(bulk_barriers);
        std::swap_ranges(shared.begin(), shared.end(), host::shared);
    }

    // Until it ends or all of its threads wait; false where `fault` says why it cannot.
    bool take_turn(Index at, int threads) {
        trade();
        if (!begun) blockIdx = at, begin_shared(threads), prepare_block(threads);
        else host::gate.arrived = 0, host::gate.generation++;
        const bool ran = run_block();
        begun = true, done = host::gate.arrived == 0;
        trade();
        return ran;
    }
};
static std::vector<Member> members;
static int rank;

// Runs `count` thread blocks, from (x, y) on, to their end; false where `fault` says why they cannot.
static bool run_cluster(int count, int x, int y, int threads) {
    members.resize(count);
    for (Member& member : members) member.begun = member.done = false, member.shared.resize(shared_bytes);
    for (int left = count; left > 0;)
        for (rank = 0; rank < count; rank++) {
            if (members[rank].done) return fault = "a cluster's barrier that not all thread blocks come to", false;
            if (!members[rank].take_turn({x + rank, y, 0}, threads)) return false;
            left -= members[rank].done;
        }
    return true;
}
}  // namespace host

static u32 cluster_rank() { return host::rank; }
static void wait_for_cluster() {
    host::gate.arrived++;
    host::give_way(host::gate);
}
static void arrive_in_cluster() {}
static void meet_cluster() { wait_for_cluster(); }
static void part_cluster() { wait_for_cluster(); }
template <class T>
static T load_remote(const T* p, u32 rank) {
    const u32 address = shared_address(p);
    host::at_shared(address, sizeof *p, alignof(T));
    if (rank >= host::members.size()) host::stop("a thread block outside the cluster");
    const u8* memory = int(rank) == host::rank ? host::shared : host::members[rank].shared.data();
    T v;
    return std::memcpy(&v, memory + address, sizeof v), v;
}
static void push(float2* p, float2 v, u32 barrier, u32 rank) {
    const u32 address = shared_address(p);
    host::at_shared(address, sizeof v, alignof(float2));
    if (rank >= host::members.size()) host::stop("a thread block outside the cluster");
    const bool own = int(rank) == host::rank;
    auto& barriers = own ? host::bulk_barriers : host::members[rank].barriers;
    const auto found = barriers.find(barrier);
    if (found == barriers.end()) host::stop("a barrier that nobody has created");
    std::memcpy((own ? host::shared : host::members[rank].shared.data()) + address, &v, sizeof v);
    found->second.pushed_bytes += sizeof v;
}
// The other thread blocks have their turn before.
static void wait_pushed(u32 barrier, u32 phase) { wait_for_cluster(), host::bulk_barrier(barrier).wait(phase); }
