// The threads of one thread block as fibers, for CUDA C++ as C++17 on an ordinary processor.
//
// Thread blocks run one behind the other, those of a cluster or that wait for each other by turns (cluster.h). A fiber runs
// until it has to wait for the others of its warp or of its thread block; what a warp does together, the last of its lanes
// to come does for all.
// Lanes that meet at different instructions, and a thread block in which nobody can get on, end the launch with a message.
#pragma once
#include <csetjmp>
#include <cstring>
#include <memory>
#include <set>
#include <ucontext.h>
#include <utility>
#include <vector>

struct Index { int x, y, z; };
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace host {
// Something to wait for: whoever waits gets on when `generation` has changed.
struct Barrier {
    int arrived = 0, generation = 0;
    const void* instruction = nullptr;
};
struct Fiber {
    ucontext_t entry;
    jmp_buf place;
    std::unique_ptr<char[]> stack;
    bool begun, done;
    const Barrier* waits;
    int generation;

    bool can_run() const { return !done && !(waits && waits->generation == generation); }
};
// What a warp does together: the operands of its lanes, and what comes out for each.
struct Warp {
    Barrier barrier;
    alignas(16) char given[32][64], found[32][64];
};
constexpr int stack_bytes = 1 << 17;
static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static Barrier block;
static Barrier gate;    // at which this thread block waits for the others of its cluster
static Barrier others;  // at which some of its threads wait for what others hand over
static int current;
static jmp_buf home;
static const char* fault;
static void (*body)();
static std::set<std::pair<int, int>> awaiting_blocks;  // thread blocks that have come to `await_producers`

[[noreturn]] static void stop(const char* message) {
    fault = message;
    _longjmp(home, 1);
}

static int next_fiber() {
    const int count = fibers.size(), warp = current / 32 * 32;
    for (int n = 1; n <= 32; n++)  // the own warp first: it meets most often
        if (const int i = warp + (current + n) % 32; i < count && fibers[i].can_run()) return i;
    for (int i = 0; i < count; i++)
        if (fibers[i].can_run()) return i;
    return -1;
}

// Goes on with the fiber `next`; without one, the thread block has ended or waits for others.
[[noreturn]] static void go_on(int next) {
    if (next < 0) {
        for (const Fiber& fiber : fibers)
            if (!fiber.done && others.arrived == 0 && gate.arrived < int(fibers.size())) stop("a barrier that not all threads come to");
        _longjmp(home, 1);
    }
    current = next, threadIdx.x = next;
    if (fibers[next].begun) _longjmp(fibers[next].place, 1);
    fibers[next].begun = true;
    setcontext(&fibers[next].entry);
    __builtin_unreachable();
}

static void enter() {
    body();
    fibers[current].done = true;
    go_on(next_fiber());
}

// Lets others run until the barrier's generation has changed. Jumps save no signal mask and are quick.
__attribute__((noinline)) static void give_way(const Barrier& barrier) {
    fibers[current].waits = &barrier, fibers[current].generation = barrier.generation;
    if (!_setjmp(fibers[current].place)) go_on(next_fiber());
}

static void wait_at(Barrier& barrier, int count, const void* instruction) {
    if (barrier.arrived == 0) barrier.instruction = instruction;
    if (barrier.instruction != instruction) stop("threads that should meet are at different instructions");
    if (++barrier.arrived < count) return give_way(barrier);
    barrier.arrived = 0, barrier.generation++;
}

// One instruction of a whole warp: `all(given, found)` has the operands of the 32 lanes and sets their results.
template <class Found, class Given, class All>
static Found together(const Given& given, All all) {
    static_assert(sizeof(Given) <= 64 && sizeof(Found) <= 64);
    static const char instruction = 0;
    Warp& warp = warps[threadIdx.x / 32];
    const int lane = threadIdx.x % 32;
    std::memcpy(warp.given[lane], &given, sizeof given);
    Barrier& barrier = warp.barrier;
    if (barrier.arrived == 0) barrier.instruction = &instruction;
    if (barrier.instruction != &instruction) stop("lanes of a warp are at different instructions");
    if (++barrier.arrived < 32) {
        give_way(barrier);
    } else {
        Given every[32];
        Found result[32];
        for (int l = 0; l < 32; l++) std::memcpy(&every[l], warp.given[l], sizeof(Given));
        all(every, result);
        for (int l = 0; l < 32; l++) std::memcpy(warp.found[l], &result[l], sizeof(Found));
        barrier.arrived = 0, barrier.generation++;
    }
    Found found;
    std::memcpy(&found, warp.found[lane], sizeof found);
    return found;
}

static void prepare_block(int threads) {
    fibers.resize(threads), warps.assign((threads + 31) / 32, {}), block = gate = others = {}, fault = nullptr;
    for (Fiber& fiber : fibers) {
        fiber.begun = fiber.done = false, fiber.waits = nullptr;
        if (!fiber.stack) fiber.stack.reset(new char[stack_bytes]);
        getcontext(&fiber.entry);
        fiber.entry.uc_stack.ss_sp = fiber.stack.get();
        fiber.entry.uc_stack.ss_size = stack_bytes;
        fiber.entry.uc_link = nullptr;
        makecontext(&fiber.entry, enter, 0);
    }
}

// Runs every thread of one thread block to its end, or until it waits for others; false where `fault` says why not.
static bool run_block() {
    if (!_setjmp(home)) {
        current = 0, threadIdx = {0, 0, 0};
        go_on(next_fiber());
    }
    return fault == nullptr;
}

static void** arguments;
template <class... P, std::size_t... i>
static void call(void (*kernel)(P...), std::index_sequence<i...>) {
    kernel(*static_cast<P*>(arguments[i])...);
}
template <class... P>
static void call(void (*kernel)(P...)) {
    call(kernel, std::index_sequence_for<P...>());
}
}  // namespace host
