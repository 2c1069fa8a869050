/* The part of the C library that scene.c needs, for WebAssembly. */
#include <stdint.h>

#define sqrtf __builtin_sqrtf
#define fabsf __builtin_fabsf

/* log(x) of a normal number above 0, as float32: x = 2^k (1 + f) with 1 + f in sqrt(1/2) ... sqrt(2), and
   log(1 + f) = 2 atanh(f / (2 + f)). */
static float logf(float x)
{
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    int32_t k = (int32_t)(bits - 0x3f3504f3u) >> 23; /* clang keeps the sign */
    bits -= (uint32_t)k << 23;
    __builtin_memcpy(&x, &bits, sizeof x);
    double f = (double)x - 1, a = f / (2 + f), z = a * a;
    double series = 1 + z * (1.0 / 3 + z * (1.0 / 5 + z * (1.0 / 7 + z * (1.0 / 9 + z / 11))));
    return (float)(k * 0.69314718055994531 + 2 * a * series);
}
