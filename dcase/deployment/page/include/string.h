/* The part of the C library that scene.c needs, for WebAssembly: instructions of the machine (-mbulk-memory). */
#define memcpy __builtin_memcpy
#define memset __builtin_memset
