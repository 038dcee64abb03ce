// Thread blocks that run by turns: those of a cluster, and those that wait for what others hand over.
#pragma once
#include "shared_memory.h"
#include <list>

namespace host {
// A thread block while another one runs.
struct Member {
    Index index = {};
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Barrier block, gate, others;
    std::vector<u8> shared;
    std::vector<Groups> groups;
    std::map<u32, BulkBarrier> barriers;
    bool begun, done;

    // In, or out again.
    void trade() {
        std::swap(index, blockIdx), std::swap(block, host::block), std::swap(gate, host::gate), std::swap(others, host::others);
        fibers.swap(host::fibers), warps.swap(host::warps), groups.swap(host::groups), barriers.swap(bulk_barriers);
        std::swap_ranges(shared.begin(), shared.end(), host::shared);
    }

    // Until it ends or waits; false where `fault` says why it cannot.
    bool take_turn(Index at, int threads) {
        trade();
        if (!begun) blockIdx = at, begin_shared(threads), prepare_block(threads);
        else for (Barrier* each : {&host::gate, &host::others}) each->arrived = 0, each->generation++;
        const bool ran = run_block();
        begun = true, done = host::gate.arrived == 0 && host::others.arrived == 0;
        trade();
        return ran;
    }
};
static std::vector<Member> members;
static int rank;

static std::list<Member> waiting;  // thread blocks without a cluster, for what others hand over
static int handed;                 // how often anything was

// Runs a thread block to its end, or until it waits; false where `fault` says why it cannot.
static bool run_alone(int x, int y, int threads) {
    static Member member;
    member.begun = false, member.shared.resize(shared_bytes);
    if (!member.take_turn({x, y, 0}, threads)) return false;
    if (!member.done) waiting.push_back(std::exchange(member, {}));
    return true;
}
static bool run_waiting(int threads) {
    while (!waiting.empty()) {
        const int handed_before = handed, count = waiting.size();
        for (Member& member : waiting)
            if (!member.take_turn({}, threads)) return false;
        waiting.remove_if([](const Member& member) { return member.done; });
        if (handed == handed_before && int(waiting.size()) == count) return fault = "thread blocks that wait for what nobody hands over", false;
    }
    return true;
}

// Runs the thread blocks of a cluster, from (x, y) on, to their end; false where `fault` says why they cannot.
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
static void store_remote2(u32 address, u32 a, u32 b, u32 rank) {
    const u32 words[2] = {a, b};
    u8* own = host::at_shared(address, 8, 8);
    if (rank >= host::members.size()) host::stop("a thread block outside the cluster");
    std::memcpy(int(rank) == host::rank ? own : host::members[rank].shared.data() + address, words, 8);
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
