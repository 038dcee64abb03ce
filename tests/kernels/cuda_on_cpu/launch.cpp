// One kernel, as a function that takes a grid: compiled with -DKERNEL=name, beside the kernel's source.
#define TEXT_OF(name) #name
#define FILE_OF(name) TEXT_OF(name.cu)
#include FILE_OF(KERNEL)

extern "C" int launch(int columns, int rows, int threads, void** given) {
    host::arguments = given;
    host::body = [] { host::call(KERNEL); };
    gridDim = {columns, rows, 1}, blockDim = {threads, 1, 1};
    try {
        for (int y = 0; y < rows; y++)
            for (int x = 0; x < columns; x++) blockIdx = {x, y, 0}, host::run_block(threads);
    } catch (const std::runtime_error&) {
        return 1;
    }
    return 0;
}
