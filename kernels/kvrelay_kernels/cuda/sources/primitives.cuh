// The few PTX instructions the kernels are made of. No CUDA header is needed, so NVRTC compiles without include paths.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#define DEVICE __device__ __forceinline__

constexpr u32 every_lane = 0xffffffffu;
DEVICE float infinity() { return __int_as_float(0x7f800000); }

DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// 16 bytes from global into shared memory, asynchronously; the bytes past `valid` become zero.
DEVICE void copy16(u32 to, const u8* from, int valid = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(max(0, min(16, valid)))
                 : "memory");
}
DEVICE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// How the bulk copy engine sees an array, as a parameter of a kernel.
struct __align__(64) TensorMap { u64 words[16]; };

// The bulk copy engine (from compute capability 9.0 on): boxes of 128-byte rows, counted in bytes by a barrier.
#if __CUDA_ARCH__ >= 900
constexpr bool has_bulk_copies = true;
DEVICE void prefetch_map(const void* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
DEVICE void create_barrier(u32 barrier) { asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier) : "memory"); }
DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void expect_bytes(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// A box of rows. What is read `once` is the first to leave the second-level cache.
template <bool once = false>
DEVICE void copy_box(u32 to, const void* map, int row, u32 barrier) {
    if constexpr (once) {
        asm volatile(
            "{.reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n\t"
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
            "[%1, {%2, %3}], [%4], policy;}" ::"r"(to),
            "l"(map), "r"(0), "r"(row), "r"(barrier)
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
            "l"(map), "r"(0), "r"(row), "r"(barrier)
            : "memory");
    }
}
// A box of 64 columns of a matrix of 16-bit elements; outside of it are zeros.
DEVICE void copy_box(u32 to, const void* map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}
// The same, of what nobody reads again: first to make room in the second-level cache.
DEVICE void copy_box_once(u32 to, const void* map, int column, int row, u32 barrier) {
    constexpr u64 evict_first = 0x12f0000000000000;  // a policy as `createpolicy` makes them
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], "
        "[%4], %5;" ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(evict_first)
        : "memory");
}
// The same, of an array in three dimensions that is not swizzled, from the first one's `column` (in words of 8 bytes), the
// middle one's `row` and the last one's `plane` on.
DEVICE void copy_planes_once(u32 to, const void* map, int row, int plane, u32 barrier, int column = 0) {
    constexpr u64 evict_first = 0x12f0000000000000;
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %4}], "
        "[%5], %6;" ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(plane), "r"(barrier), "l"(evict_first)
        : "memory");
}
// Bytes as they lie, a multiple of 16 from and to multiples of 16.
DEVICE void copy_bytes(u32 to, const u8* from, int bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
        "r"(bytes), "r"(barrier)
        : "memory");
}
DEVICE void wait_barrier(u32 barrier, u32 phase) {
    u32 done;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done) : "r"(barrier), "r"(phase) : "memory");
    } while (!done);
}
// Ordinary writes to shared memory before, bulk copies over the same bytes after.
DEVICE void order_before_bulk() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#else
constexpr bool has_bulk_copies = false;
DEVICE void prefetch_map(const void*) {}
DEVICE void create_barrier(u32) {}
DEVICE void publish_barriers() {}
DEVICE void expect_bytes(u32, int) {}
template <bool once = false>
DEVICE void copy_box(u32, const void*, int, u32) {}
DEVICE void copy_bytes(u32, const u8*, int, u32) {}
DEVICE void wait_barrier(u32, u32) {}
DEVICE void order_before_bulk() {}
#endif

// Where byte `offset` of a box lands: 16-byte units of each 128-byte row trade places, so that the rows of a matrix
// meet no bank twice. The copy engine's own 128-byte swizzle; boxes begin at multiples of 1024.
DEVICE u32 swizzled(u32 offset) { return offset ^ (offset >> 3 & 0x70); }

// Matrices of 8 rows x 16 bytes; lane l gives the row addresses and receives row l/4, bytes 4(l%4) to +3 of each.
DEVICE void load_matrices(u32 (&r)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
DEVICE void load_matrices(u32 (&r)[2], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(row) : "memory");
}
// Transposed in units of 2 bytes: lane l receives unit l/4 of rows 2(l%4) (low half) and 2(l%4)+1 (high half).
DEVICE void load_transposed(u32 (&r)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
DEVICE void load_transposed(u32 (&r)[2], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(row) : "memory");
}

// An 8 x 8 matrix of halves that a warp holds, a lane elements 2(l%4) and 2(l%4)+1 of row l/4, transposed.
DEVICE u32 transpose_halves(u32 pair) {
    u32 r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(pair));
    return r;
}

DEVICE u32 load_shared(u32 address) {
    u32 word;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
    return word;
}
DEVICE void load_shared2(u32& a, u32& b, u32 address) {
    asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(a), "=r"(b) : "r"(address) : "memory");
}
DEVICE void load_shared4(u32& a, u32& b, u32& c, u32& d, u32 address) {
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(address) : "memory");
}

DEVICE u32 load_shared_half(u32 address) {
    u32 word;
    asm volatile("{.reg .b16 h; ld.shared.b16 h, [%1]; cvt.u32.u16 %0, h;}" : "=r"(word) : "r"(address) : "memory");
    return word;
}
DEVICE u32 load_shared_byte(u32 address) {
    u32 word;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
    return word;
}
DEVICE void store_shared(u32 address, u32 word) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}
DEVICE void store_shared2(u32 address, u32 a, u32 b) {
    asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}
DEVICE void store_shared_byte(u32 address, u32 byte) {
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(byte) : "memory");
}
DEVICE void store_shared4(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// c += a * b on tensor cores: a 16 x 16 (row), b 16 x 8 (column), c 16 x 8 in float32.
template <bool bfloat16>
DEVICE void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if constexpr (bfloat16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
}

// c += a * b on tensor cores, exact: a of 16 rows of unsigned bytes, b of 8 columns of signed ones, 32 or 16 of them; c is
// 16 x 8. Lane (g, t) has bytes 4t to 4t + 3, and 16 more on, of rows g and g + 8 of a and of column g of b.
DEVICE void multiply_bytes(int (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void multiply_bytes(int (&c)[4], const u32 (&a)[2], const u32 (&b)[1]) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

// A constant in a register of its own. What the compiler knows to be constant, or the same in all lanes, it would write
// out anew before every use; it does not know that squares have no second bit.
DEVICE u32 in_register(u32 x) {
    u32 r;
    asm volatile("{.reg .b32 n; mov.u32 n, %%laneid; mul.lo.u32 n, n, n; and.b32 n, n, 2; or.b32 %0, %1, n;}" : "=r"(r) : "r"(x));
    return r;
}
DEVICE u32 permute_bytes(u32 a, u32 b, u32 selector) {
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
    return r;
}
// Bits of `a` where the mask has ones, else of `b`: one instruction, which the compiler would not choose by itself.
DEVICE u32 choose_bits(u32 a, u32 b, u32 mask) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(r) : "r"(a), "r"(b), "r"(mask));
    return r;
}
DEVICE u32 multiply_halves(u32 a, u32 b) {
    u32 r;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
DEVICE u32 multiply_bfloats(u32 a, u32 b) {
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000u));  // less nothing
    return r;
}
DEVICE u32 fma_halves(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

// a * b + c, but 0 where that is negative.
DEVICE u32 fma_halves_relu(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.relu.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / x to about a unit in the last place; of what is below 2^-126, infinity.
DEVICE float inverse_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float from_half(u32 bits) {
    float x;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(x) : "r"(bits));
    return x;
}
DEVICE float low_half(u32 pair) { return from_half(pair & 0xffffu); }
DEVICE float high_half(u32 pair) { return from_half(pair >> 16); }
DEVICE float low_bfloat(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high_bfloat(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

template <bool bfloat16>
DEVICE u32 pack(float low, float high) {
    u32 r;
    if constexpr (bfloat16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    }
    return r;
}

// Counts up to `limit` and starts over; what this thread block wrote before is visible to whoever arrives later.
DEVICE u32 arrive(u32* counter, u32 limit) {
    u32 old;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(limit) : "memory");
    return old;
}

// Reads of what others wrote during this launch, or shortly before: past the first-level cache.
DEVICE float4 load_fresh(const float4* p) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
    return v;
}

DEVICE int load_fresh(const int* p) {
    int v;
    asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
DEVICE u32 load_fresh(const u32* p) {
    u32 v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
DEVICE uint2 load_fresh(const uint2* p) {
    uint2 v;
    asm volatile("ld.global.cg.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
    return v;
}
DEVICE uint4 load_fresh(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}

// Numbers that one thread block hands to another one of its launch, through memory and without a fence: each word says
// itself that it is there, as long as it is `absent` before. No number is: a NaN like it is handed over as another one.
constexpr u32 absent = 0xffffffffu;
DEVICE u32 as_handed(float x) { return __float_as_uint(x) == absent ? 0x7fffffffu : __float_as_uint(x); }
DEVICE void hand_over(float4* p, float4 v) {
    asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(as_handed(v.x)), "r"(as_handed(v.y)),
                 "r"(as_handed(v.z)), "r"(as_handed(v.w))
                 : "memory");
}
DEVICE float4 load_handed(const float4* p) {
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
    return v;
}
DEVICE bool is_handed(float4 v) {
    return __float_as_uint(v.x) != absent && __float_as_uint(v.y) != absent && __float_as_uint(v.z) != absent && __float_as_uint(v.w) != absent;
}
// So that it is absent for the next launch.
DEVICE void take_back(float4* p) {
    asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1,%1,%1,%1};" ::"l"(p), "r"(absent) : "memory");
}

DEVICE float not_a_number() { return __int_as_float(0x7fffffff); }
// The smaller and the larger; NaN where one is NaN.
DEVICE float min_or_nan(float a, float b) {
    float r;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
DEVICE float max_or_nan(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

// The nearest e4m3 of two floats, the first in the low byte (from compute capability 8.9 on).
#if __CUDA_ARCH__ >= 890
constexpr bool converts_e4m3 = true;
DEVICE u32 e4m3_pair(float low, float high) {
    u16 r;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
    return r;
}
#else
constexpr bool converts_e4m3 = false;
DEVICE u32 e4m3_pair(float, float) { return 0; }
#endif

// Thread-block clusters (from compute capability 9.0 on): blocks that run together and read each other's shared memory.
#if __CUDA_ARCH__ >= 900
DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// All threads of the cluster; what they wrote to shared memory before is visible to all behind.
DEVICE void meet_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same without the memory: nobody goes on before all have come, and what was read before is read.
DEVICE void part_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}
// What lies at `p` of the own shared memory, in that of the cluster's thread block `rank`.
DEVICE float2 load_remote(const float2* p, u32 rank) {
    u32 there;
    float2 v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(p)), "r"(rank));
    asm volatile("ld.shared::cluster.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(there) : "memory");
    return v;
}
DEVICE float4 load_remote(const float4* p, u32 rank) {
    u32 there;
    float4 v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(p)), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(there) : "memory");
    return v;
}
// Two words to a shared address, but of thread block `rank`.
DEVICE void store_remote2(u32 address, u32 a, u32 b, u32 rank) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("st.shared::cluster.v2.b32 [%0], {%1,%2};" ::"r"(there), "r"(a), "r"(b) : "memory");
}
// All threads of all thread blocks of the cluster arrive, and later wait for each other: barriers that were published
// before stand then for all.
DEVICE void arrive_in_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void wait_for_cluster() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// Into what lies at `p` of the own shared memory, but in that of thread block `rank`, whose `barrier` counts the bytes.
DEVICE void push(float2* p, float2 v, u32 barrier, u32 rank) {
    u32 there, count;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(p)), "r"(rank));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(count) : "r"(barrier), "r"(rank));
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1,%2}, [%3];" ::"r"(there),
                 "f"(v.x), "f"(v.y), "r"(count)
                 : "memory");
}
DEVICE void wait_pushed(u32 barrier, u32 phase) {
    u32 done;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done) : "r"(barrier), "r"(phase) : "memory");
    } while (!done);
}
#else
DEVICE u32 cluster_rank() { return 0; }
DEVICE void meet_cluster() {}
DEVICE void part_cluster() {}
DEVICE float2 load_remote(const float2* p, u32) { return *p; }
DEVICE float4 load_remote(const float4* p, u32) { return *p; }
DEVICE void store_remote2(u32, u32, u32, u32) {}
DEVICE void arrive_in_cluster() {}
DEVICE void wait_for_cluster() {}
DEVICE void push(float2*, float2, u32, u32) {}
DEVICE void wait_pushed(u32, u32) {}
#endif

// Programmatic dependent launch (from compute capability 9.0 on); cuda/launch.py has the rules.
#if __CUDA_ARCH__ >= 900
// Until all kernels ahead have ended, and what they wrote is visible.
DEVICE void await_producers() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Lets the next kernel in, once all thread blocks of this one have come here.
DEVICE void release_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
DEVICE void await_producers() {}
DEVICE void release_dependents() {}
#endif
// Has the 128 bytes around `p` brought into the second-level cache: ahead of the wait, for a load behind it, which the
// compiler would put there anyway.
DEVICE void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Reads of what the other warps of a thread block read, too: through the first-level cache, so that not all of them meet
// at one place of the second. Behind `await_producers`, or of what no kernel of a step writes.
DEVICE int load_near(const int* p) {
    int v;
    asm volatile("ld.global.ca.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
DEVICE u32 load_near(const u32* p) {
    u32 v;
    asm volatile("ld.global.ca.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
DEVICE uint2 load_near(const uint2* p) {
    uint2 v;
    asm volatile("ld.global.ca.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
    return v;
}
DEVICE uint4 load_near(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.ca.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}

// Reads of what no thread block reads again: past the first-level cache, which has better things to keep.
DEVICE uint4 load_once(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
DEVICE uint2 load_once(const uint2* p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
