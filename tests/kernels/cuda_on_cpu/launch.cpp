// One kernel, as a function that takes a grid: compiled with -DKERNEL=name, beside the kernel's source.
#ifndef CLUSTER
#define CLUSTER 1  // thread blocks that run together
#endif
#define TEXT_OF(name) #name
#define FILE_OF(name) TEXT_OF(name.cu)
#include FILE_OF(KERNEL)

// Null, or what went wrong.
extern "C" const char* launch(int columns, int rows, int threads, int shared_bytes, void** given) {
    if (shared_bytes > host::most_shared_bytes) return "more shared memory than there is";
    host::arguments = given, host::shared_bytes = shared_bytes;
    host::body = [] { host::call(KERNEL); };
    host::awaiting_blocks.clear(), host::waiting.clear();
    gridDim = {columns, rows, 1}, blockDim = {threads, 1, 1};
    for (int y = 0; y < rows; y++)
        for (int x = 0; x < columns; x += CLUSTER)
            if (!(CLUSTER == 1 ? host::run_alone(x, y, threads) : host::run_cluster(CLUSTER, x, y, threads))) return host::fault;
    if (!host::run_waiting(threads)) return host::fault;
    const int awaiting = host::awaiting_blocks.size();
    return awaiting == 0 || awaiting == columns * rows ? nullptr : "a thread block that does not await its producers";
}
