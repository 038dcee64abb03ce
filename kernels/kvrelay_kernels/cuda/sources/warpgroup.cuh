// Hopper's warpgroup instructions: matrix products of 64 rows by four warps, operands in shared memory or registers.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
#pragma once
#include "primitives.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_WARPGROUPS 1
#else
#define HAS_WARPGROUPS 0
#endif

#if HAS_WARPGROUPS
#if BFLOAT
#define OPERANDS "f32.bf16.bf16"
#else
#define OPERANDS "f32.f16.f16"
#endif

// Where a matrix of 16-bit elements lies in shared memory, in rows of 128 swizzled bytes. Eight rows are a unit:
// `stride` is from unit to unit of rows, `leading` from 64 columns to the next where rows are summed over.
DEVICE u64 describe(u32 address, u32 leading, u32 stride) {
    return u64(address >> 4) | u64(leading >> 4) << 16 | u64(stride >> 4) << 32 | 1ull << 62;
}
// What moving by `bytes` adds to a description.
DEVICE u64 moved(u32 bytes) { return bytes >> 4; }

DEVICE void open_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
DEVICE void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Keeps the compiler from touching accumulators while products run.
template <int n>
DEVICE void hold(float (&d)[n]) {
#pragma unroll
    for (int i = 0; i < n; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#define LIST_4(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define LIST_8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define LIST_32(d, i) LIST_8(d, i), LIST_8(d, i + 8), LIST_8(d, i + 16), LIST_8(d, i + 24)
#define LIST_16(d) LIST_8(d, 0), LIST_8(d, 8)
#define LIST_48(d) LIST_32(d, 0), LIST_8(d, 32), LIST_8(d, 40)
#define LIST_64(d) LIST_32(d, 0), LIST_32(d, 32)
#define NAMES_4 "%0, %1, %2, %3"
#define NAMES_8 NAMES_4 ", %4, %5, %6, %7"
#define NAMES_16 NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32                                                                                                 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_48 NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_64 NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d = a * b^T (+ d): a 64 x 16, b n x 16, both in shared memory, summed along their rows of 128 bytes.
#define FROM_SHARED(columns, names, list, a_name, b_name, add_name)                                               \
    template <bool add>                                                                                           \
    DEVICE void multiply_shared(float (&d)[columns / 2], u64 a, u64 b) {                                          \
        asm volatile("{.reg .pred p; setp.ne.b32 p, " add_name ", 0; wgmma.mma_async.sync.aligned.m64n" #columns   \
                     "k16." OPERANDS " {" names "}, " a_name ", " b_name ", p, 1, 1, 0, 0;}"                      \
                     : list : "l"(a), "l"(b), "n"(int(add)));                                                     \
    }
FROM_SHARED(8, NAMES_4, LIST_4(d), "%4", "%5", "%6")
FROM_SHARED(16, NAMES_8, LIST_8(d, 0), "%8", "%9", "%10")
FROM_SHARED(32, NAMES_16, LIST_16(d), "%16", "%17", "%18")
FROM_SHARED(64, NAMES_32, LIST_32(d, 0), "%32", "%33", "%34")
FROM_SHARED(128, NAMES_64, LIST_64(d), "%64", "%65", "%66")

// d += a * b: a 64 x 16 in registers, b 16 x n in shared memory, summed over its rows.
#define FROM_REGISTERS(columns, names, list, a_names, b_name)                                                    \
    DEVICE void multiply_registers(float (&d)[columns / 2], const u32* a, u64 b) {                                \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16." OPERANDS " {" names "}, {" a_names "}, " \
                     b_name ", 1, 1, 1, 1;"                                                                       \
                     : list : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                \
    }
FROM_REGISTERS(64, NAMES_32, LIST_32(d, 0), "%32, %33, %34, %35", "%36")
FROM_REGISTERS(96, NAMES_48, LIST_48(d), "%48, %49, %50, %51", "%52")
FROM_REGISTERS(128, NAMES_64, LIST_64(d), "%64, %65, %66, %67", "%68")

// d += a * b^T: a 64 x 16 halves in registers, b n x 16 halves in shared memory, summed along its rows of 128 bytes.
#define HALVES_FROM_REGISTERS(columns, names, list, a_names, b_name)                                             \
    DEVICE void multiply_halves(float (&d)[columns / 2], const u32 (&a)[4], u64 b) {                              \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.f16.f16 {" names "}, {" a_names "}, " \
                     b_name ", 1, 1, 1, 0;"                                                                       \
                     : list : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                \
    }
HALVES_FROM_REGISTERS(8, NAMES_4, LIST_4(d), "%4, %5, %6, %7", "%8")
HALVES_FROM_REGISTERS(16, NAMES_8, LIST_8(d, 0), "%8, %9, %10, %11", "%12")
HALVES_FROM_REGISTERS(32, NAMES_16, LIST_16(d), "%16, %17, %18, %19", "%20")
HALVES_FROM_REGISTERS(64, NAMES_32, LIST_32(d, 0), "%32, %33, %34, %35", "%36")

// Registers move between warpgroups: those that copy need few, those that multiply many.
template <int count>
DEVICE void keep_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
#endif

// Barriers that count arrivals, and named barriers of a few warps.
#if __CUDA_ARCH__ >= 900
DEVICE void create_barrier(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void arrive_at(u32 barrier) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory"); }
// A box of a matrix in four dimensions, such as [blocks, heads, tokens, elements]; outside of it are zeros.
DEVICE void copy_box(u32 to, const void* map, int element, int token, int head, int block, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
        "[%6];" ::"r"(to), "l"(map), "r"(element), "r"(token), "r"(head), "r"(block), "r"(barrier)
        : "memory");
}
#endif
DEVICE void meet(int name, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory"); }

// Four bytes from global into shared memory, asynchronously.
DEVICE void copy4(u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void wait_all_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four matrices of 8 rows x 16 bytes from registers, laid out as load_matrices reads them.
#if __CUDA_ARCH__ >= 900
DEVICE void store_matrices(u32 row, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}
#endif
