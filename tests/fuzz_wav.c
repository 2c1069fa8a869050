/* main.c's readers as a function of bytes, for clang's libFuzzer: test_export_c.py compiles and runs it. */
#define _POSIX_C_SOURCE 200809L /* fmemopen */
#define main main_of_scene
#include "main.c"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    for (int is_stream = 0; size && is_stream < 2; is_stream++) {
        sound w = {fmemopen((void *)data, size, "rb"), "fuzz", 0, 2, 1, 0, is_stream};
        if (!w.file) return -1;
        if (is_stream || !open_wav(&w)) run(&w, is_stream, is_stream);
        fclose(w.file);
    }
    return 0;
}
