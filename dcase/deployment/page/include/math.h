/* The part of the C library that scene.c needs, for WebAssembly. */
#define sqrtf __builtin_sqrtf
#define fabsf __builtin_fabsf
