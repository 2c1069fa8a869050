/* Waveform to logits: resampler, log-mel, convolutions, Mamba. weights.h holds the shape, the tables and the weights.

   Activations lie in the arena as (channel, frame). Everything before the Mamba layers works on single rows of mel bins:
   `push` hands a row from stage to stage, and each keeps the three rows that its 3 x 3 kernel sees. The arena is used
   three times: for the sound and its spectrum while samples come in, for the stages' rows, and for one Mamba layer.
   Tokens are written over the part of the log-mel that has been read. */
#if defined __GNUC__ && defined __MMX__ && !defined __clang__
#pragma GCC target("no-mmx") /* GCC 12 uses a register of MMX here by -O3, and the caller's next long double is NaN */
#endif
#include "scene.h"

#include <math.h>
#include <string.h>

/* A matrix of the stored model: float16, or int8 codes with a float16 scale for each row. Those that `product` takes lie
   in panels of four rows, (n, 4), each filled up with zeros. */
typedef struct {
    const void *data;
    const uint16_t *scale; /* null for float16 */
    int is_int8; /* the scale may be part of an affine instead */
} matrix;

enum { CONVOLUTION, RESIDUAL, PATCHES, MEAN };

/* What is done with rows of mel bins. Affines are a scale and a shift of each channel: BatchNorm, and the codes' scale. */
typedef struct {
    int kind;
    uint32_t c_in, wide, c_out, t_in, t_out; /* channels and frames */
    uint32_t stride_mel, stride_time, shortcut; /* shortcut: 0, 1, or 2 for an average */
    uint32_t inner, outer; /* where in the arena the rows before and within a residual are kept */
    matrix expand, depthwise, project; /* a convolution is its project */
    const float *affine_expand, *affine_depthwise, *affine_project;
} stage;

/* The parameters of one direction of a Mamba layer. */
typedef struct {
    matrix conv, x_proj, dt_proj, a_log;
    const uint16_t *conv_bias, *dt_bias, *d;
} branch;

typedef struct {
    matrix local, in_proj, out_proj;
    const uint16_t *local_bias, *norm;
    branch branches[2];
} layer;

typedef struct {
    const stage *stages;
    const layer *layers;
    const uint16_t *patch_bias, *pos_mel, *pos_time;
    const float *affine_features; /* BatchNorm before the head */
    matrix head;
    const float *affine_head;
} model;

#include "weights.h"

#define LOG2_E 1.44269504f

/* ---- numbers ---- */

static float of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Return a finite float16's value: its exponent is smaller by 112. */
static float half(uint16_t h)
{
    float x = of_bits((uint32_t)(h & 0x7fff) << 13) * 0x1p112f;
    return h & 0x8000 ? -x : x;
}

static float value_of(matrix m, size_t i)
{
    return m.is_int8 ? (float)((const int8_t *)m.data)[i] : half(((const uint16_t *)m.data)[i]);
}

static float scale_of(matrix m, size_t row)
{
    return m.scale ? half(m.scale[row]) : 1.0f;
}

/* Four numbers that are calculated together: in one register where the processor has such, and the compiler knows. */
#if defined __GNUC__ && (defined __SSE__ || defined __ARM_NEON || defined __wasm_simd128__)
typedef float four __attribute__((vector_size(16)));
static four plus(four x, four y) { return x + y; }
static four times(four x, four y) { return x * y; }
static four scaled(four x, float w) { return x * w; }

static four load(const float *x)
{
    four y;
    memcpy(&y, x, sizeof y);
    return y;
}

static void store(float *to, four x)
{
    memcpy(to, &x, sizeof x);
}
#else
typedef struct {
    float a, b, c, d;
} four;
static four plus(four x, four y) { return (four){x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d}; }
static four times(four x, four y) { return (four){x.a * y.a, x.b * y.b, x.c * y.c, x.d * y.d}; }
static four scaled(four x, float w) { return (four){x.a * w, x.b * w, x.c * w, x.d * w}; }
static four load(const float *x) { return (four){x[0], x[1], x[2], x[3]}; }
static void store(float *to, four x) { to[0] = x.a, to[1] = x.b, to[2] = x.c, to[3] = x.d; }
#endif

/* ---- log-mel ---- */

/* Return sine and cosine of i of N_FFT parts of a turn, up to three quarters. */
static void turn(size_t i, float *sine, float *cosine)
{
    size_t r = i % (N_FFT / 4);
    float s = sines[r], c = sines[N_FFT / 4 - r];
    switch (i / (N_FFT / 4)) {
    case 0: *sine = s, *cosine = c; break;
    case 1: *sine = c, *cosine = -s; break;
    default: *sine = -s, *cosine = -c;
    }
}

/* A transform of four numbers: p[0] and three that are given, rotated, by the remainder of 4 of their places in time.
   It is written to p and each m-th number from there. */
static inline void cross(float *p, size_t m, float re1, float im1, float re2, float im2, float re3, float im3)
{
    float sum_re = p[0] + re2, sum_im = p[1] + im2, dif_re = p[0] - re2, dif_im = p[1] - im2;
    float odd_re = re1 + re3, odd_im = im1 + im3, odd_dre = re1 - re3, odd_dim = im1 - im3;
    p[0] = sum_re + odd_re, p[1] = sum_im + odd_im;
    p[2 * m] = dif_re + odd_dim, p[2 * m + 1] = dif_im - odd_dre;
    p[4 * m] = sum_re - odd_re, p[4 * m + 1] = sum_im - odd_im;
    p[6 * m] = dif_re - odd_dim, p[6 * m + 1] = dif_im + odd_dre;
}

/* Fourier transform of N_FFT / 2 complex numbers, which lie in bit-reversed order, in place. */
static void transform(float *z)
{
    size_t m = 1;
    if (FFT_BITS % 2) {
        for (size_t i = 0; i < N_FFT; i += 4) {
            float re = z[i + 2], im = z[i + 3];
            z[i + 2] = z[i] - re, z[i + 3] = z[i + 1] - im;
            z[i] += re, z[i + 1] += im;
        }
        m = 2;
    }
    for (; m < N_FFT / 2; m *= 4) {
        for (size_t i = 0; i < N_FFT; i += 8 * m) { /* without a rotation */
            const float *p = z + i;
            cross(z + i, m, p[4 * m], p[4 * m + 1], p[2 * m], p[2 * m + 1], p[6 * m], p[6 * m + 1]);
        }
        for (size_t j = 1; j < m; j++) {
            size_t part = j * (N_FFT / 4 / m); /* of a turn */
            float s1 = sines[part], c1 = sines[N_FFT / 4 - part], s2, c2, s3, c3; /* products of these are too coarse */
            turn(2 * part, &s2, &c2), turn(3 * part, &s3, &c3);
            for (size_t i = 2 * j; i < N_FFT; i += 8 * m) {
                const float *p2 = z + i + 2 * m, *p1 = p2 + 2 * m, *p3 = p1 + 2 * m;
                cross(z + i, m, c1 * p1[0] + s1 * p1[1], c1 * p1[1] - s1 * p1[0], c2 * p2[0] + s2 * p2[1],
                      c2 * p2[1] - s2 * p2[0], c3 * p3[0] + s3 * p3[1], c3 * p3[1] - s3 * p3[0]);
            }
        }
    }
}

/* Turn the transform of even samples + i odd samples into powers: bin k at z[2 k], the last one at z[1]. */
static void powers(float *z)
{
    float first = z[0] + z[1], last = z[0] - z[1];
    z[0] = first * first, z[1] = last * last;
    for (size_t k = 1; k <= N_FFT / 4; k++) {
        float *low = z + 2 * k, *high = z + N_FFT - 2 * k, s, c;
        float even_re = 0.5f * (low[0] + high[0]), even_im = 0.5f * (low[1] - high[1]);
        float odd_re = 0.5f * (low[1] + high[1]), odd_im = 0.5f * (high[0] - low[0]);
        s = sines[k], c = sines[N_FFT / 4 - k];
        float re = c * odd_re + s * odd_im, im = c * odd_im - s * odd_re;
        float sum_re = even_re + re, sum_im = even_im + im, dif_re = even_re - re, dif_im = even_im - im;
        low[0] = sum_re * sum_re + sum_im * sum_im;
        high[0] = dif_re * dif_re + dif_im * dif_im;
    }
}

/* Return log(x), x > 0: with x = 2^k m and f = m - 1 it is k log(2) + 2 atanh(f / (2 + f)), where m is around 1. */
static float log_of(float x)
{
    uint32_t bits = bits_of(x) + (0x3f800000u - 0x3f3504f3u); /* m is at least sqrt(1 / 2) */
    float k = (float)((int32_t)(bits >> 23) - 127), f = of_bits((bits & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
    float a = f / (2.0f + f), z = a * a;
    float series = (((z * (1.0f / 9) + 1.0f / 7) * z + 1.0f / 5) * z + 1.0f / 3) * z;
    return k * 0.693147182f + (2.0f * a * series + 2.0f * a);
}

/* z = the last WINDOW samples times the window, as complex numbers in bit-reversed order. Beyond the clip's ends the
   samples are reflected. */
static void window(const scene *s, float *z)
{
    int32_t first = (int32_t)(s->frames * HOP) - EDGE, end = LENGTH - 1 - first, n;
    int32_t from = (first < 0 ? -first : first) % WINDOW;
    size_t reversed = 0;
    memset(z, 0, N_FFT * sizeof *z);
    for (int32_t i = 0; i < WINDOW; i += n) { /* up to where the ring, the sound or the window ends or turns */
        int32_t is_back = i < -first || i >= end, turn_at = i < -first ? -first : is_back ? WINDOW : end;
        int32_t is_falling = i > WINDOW / 2, j = is_falling ? WINDOW - i : i;
        n = is_back ? from + 1 : WINDOW - from;
        if (n > turn_at - i) n = turn_at - i;
        if (n > (is_falling ? WINDOW : WINDOW / 2 + 1) - i) n = (is_falling ? WINDOW : WINDOW / 2 + 1) - i;
        const float *x = s->arena + SOUND + from, *h = hann + j;
        int32_t x_step = is_back ? -1 : 1, h_step = is_falling ? -1 : 1;
        for (int32_t k = 0; k < n; k++) {
            z[2 * reversed + (size_t)((i + k) & 1)] = x[x_step * k] * h[h_step * k];
            if ((i + k) & 1) { /* add 1 to the number whose bits are reversed */
                size_t bit = N_FFT / 4;
                for (; reversed & bit; bit >>= 1) reversed ^= bit;
                reversed |= bit;
            }
        }
        from += is_back ? -n : n;
        from = from < 0 ? WINDOW - 1 : from == WINDOW ? 0 : from;
    }
}

/* Calculate one frame of the log-mel. */
static void frame(scene *s)
{
    float *z = s->arena + SPECTRUM, *mel = s->arena + LOG_MEL + s->frames;
    window(s, z);
    transform(z);
    powers(z);
    float above = 0; /* of this mel bin: what the FFT bins below its centre gave */
    for (size_t m = 0; m <= N_MELS; m++) { /* FFT bins between two neighbouring centres */
        float rising = 0, falling = 0;
        for (size_t k = mel_starts[m]; k < mel_starts[m + 1]; k++) {
            float power = z[k == N_FFT / 2 ? 1 : 2 * k], share = mel_shares[k];
            rising += share * power, falling += (1.0f - share) * power;
        }
        if (m) mel[(m - 1) * FRAMES] = (log_of(above + falling + LOG_OFFSET) - MEL_MEAN) / MEL_DEVIATION;
        above = rising;
    }
    s->frames++;
}

/* Take a sample at the model's rate, and calculate the frames that it completes. */
static void take(scene *s, float x)
{
    s->arena[SOUND + s->resampled % WINDOW] = x;
    s->resampled++;
    while (s->frames < FRAMES_OF_CLIP && s->resampled >= EDGE && /* the first one's reflection needs these */
           (s->resampled == LENGTH || s->resampled >= s->frames * HOP + WINDOW - EDGE))
        frame(s);
}

#if UP != DOWN
/* Take an input sample, and calculate the resampled ones that it completes. Zeros lie beyond the clip's ends. */
static void resample(scene *s, float x, uint32_t index)
{
    size_t place = index % TAPS;
    s->history[place] = s->history[place + TAPS] = x;
    const float *input = s->history + place + 1; /* the oldest, if x is the newest */
    while (s->wanted == index && s->resampled < LENGTH) {
        float sum = 0, odd = 0;
        int is_mirrored = s->phase > UP / 2; /* the mirror image of another phase, but for what that lacks */
        size_t row = (is_mirrored ? UP - s->phase : s->phase) * TAPS;
        const float *tap = kernels + row, *end = input + TAPS - 1;
        const int8_t *lack = lacking + row;
        if (is_mirrored)
            for (size_t i = 0; i < TAPS; i += 2) {
                sum += (tap[i] + LACKING_UNIT * (float)lack[i]) * *(end - i);
                odd += (tap[i + 1] + LACKING_UNIT * (float)lack[i + 1]) * *(end - i - 1);
            }
        else
            for (size_t i = 0; i < TAPS; i += 2) sum += tap[i] * input[i], odd += tap[i + 1] * input[i + 1];
        sum += odd;
        uint32_t position = s->phase * DOWN / UP;
        s->phase++;
        s->wanted += s->phase * DOWN / UP - position;
        s->phase %= UP;
        take(s, sum);
    }
}
#endif

static void begin(scene *s)
{
    int32_t device = s->device;
    memset(s, 0, sizeof *s);
    s->device = device;
    s->wanted = LAST_TAP;
}

void scene_init(scene *s)
{
    s->device = 0;
    begin(s);
}

int scene_set_device(scene *s, int device)
{
    if (device < 0 || device >= SCENE_DEVICES) return -1;
    s->device = device;
    return 0;
}

static void push_one(scene *s, float x)
{
    if (!(fabsf(x) <= SCENE_LOUDEST)) { /* NaN, too */
        s->refused = 1;
        x = 0;
    }
#if UP != DOWN
    resample(s, x, s->taken++);
    if (s->taken == SCENE_SAMPLES)
        for (uint32_t i = SCENE_SAMPLES; s->resampled < LENGTH; i++) resample(s, 0, i);
#else
    s->taken++;
    take(s, x);
#endif
}

size_t scene_push(scene *s, const float *samples, size_t n)
{
    size_t i = 0;
    for (; i < n && s->taken < SCENE_SAMPLES; i++) push_one(s, samples[i]);
    return i;
}

size_t scene_push_int16(scene *s, const int16_t *samples, size_t n)
{
    size_t i = 0;
    for (; i < n && s->taken < SCENE_SAMPLES; i++) push_one(s, (float)samples[i] / 32768);
    return i;
}

/* ---- products ---- */

/* Name the n rows of t frames from ``x`` on as those that `product` sums. */
static void use_rows(scene *s, uint32_t x, uint32_t n, uint32_t t)
{
    for (uint32_t k = 0; k < n; k++) s->at[k] = x + k * t;
}

/* sums (6, 4) = six frames of the n rows that lie ``at`` places in x, transposed, times a panel (n, 4) of weights; with a
   scale and a shift of each of the four. */
static void block(const float *panel, const float *x, const uint32_t *at, uint32_t n, four scale, four shift,
                  float *sums)
{
    static const float zeros[4];
    four s0 = load(zeros), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0;
    for (uint32_t k = 0; k < n; k++, panel += 4) {
        const float *frames = x + at[k];
        four w = load(panel);
        s0 = plus(s0, scaled(w, frames[0]));
        s1 = plus(s1, scaled(w, frames[1]));
        s2 = plus(s2, scaled(w, frames[2]));
        s3 = plus(s3, scaled(w, frames[3]));
        s4 = plus(s4, scaled(w, frames[4]));
        s5 = plus(s5, scaled(w, frames[5]));
    }
    store(sums, plus(times(s0, scale), shift)), store(sums + 4, plus(times(s1, scale), shift));
    store(sums + 8, plus(times(s2, scale), shift)), store(sums + 12, plus(times(s3, scale), shift));
    store(sums + 16, plus(times(s4, scale), shift)), store(sums + 20, plus(times(s5, scale), shift));
}

/* y (outs, t) = a matrix (outs, n) times the rows (n, t) that `use_rows` named; with an affine and ReLU, or added to y.
   ``norm``: factors of the n rows, or null. Four rows of the matrix by six frames at a time: 24 sums stay in registers.
   The last six frames overlap those before them; where there are fewer, what lies beyond a row's end is read too, but
   nothing is written there. */
static void product(scene *s, matrix w, const float *norm, uint32_t outs, uint32_t n, uint32_t t, const float *affine,
                    int relu, int add, float *y)
{
    float *panel = s->arena + PANEL;
    for (uint32_t o = 0; o < outs; o += 4) {
        uint32_t high = outs - o < 4 ? outs - o : 4;
        if (w.is_int8) {
            const int8_t *codes = (const int8_t *)w.data + o * n;
            for (uint32_t k = 0; k < 4 * n; k += 4) {
                panel[k] = (float)codes[k], panel[k + 1] = (float)codes[k + 1];
                panel[k + 2] = (float)codes[k + 2], panel[k + 3] = (float)codes[k + 3];
            }
        } else {
            const uint16_t *halves = (const uint16_t *)w.data + o * n;
            for (uint32_t k = 0; k < 4 * n; k++) panel[k] = half(halves[k]);
        }
        for (uint32_t k = 0; norm && k < n; k++) store(panel + 4 * k, scaled(load(panel + 4 * k), norm[k]));
        float scale[4] = {0}, shift[4] = {0};
        for (uint32_t i = 0; i < high; i++) {
            scale[i] = affine ? affine[2 * (o + i)] : scale_of(w, o + i);
            shift[i] = affine ? affine[2 * (o + i) + 1] : 0.0f;
        }
        for (uint32_t done = 0, t0; done < t; done = t0 + FRAMES_AT_ONCE) {
            float sums[4 * FRAMES_AT_ONCE];
            t0 = done + FRAMES_AT_ONCE <= t || t < FRAMES_AT_ONCE ? done : t - FRAMES_AT_ONCE;
            block(panel, s->arena + t0, s->at, n, load(scale), load(shift), sums);
            uint32_t end = t - t0 < FRAMES_AT_ONCE ? t : t0 + FRAMES_AT_ONCE;
            for (uint32_t j = done; j < end; j++) {
                const float *value = sums + 4 * (j - t0);
                float *to = y + o * t + j;
                if (relu)
                    for (uint32_t i = 0; i < high; i++, to += t) *to = value[i] < 0 ? 0 : value[i];
                else if (add)
                    for (uint32_t i = 0; i < high; i++, to += t) *to += value[i];
                else
                    for (uint32_t i = 0; i < high; i++, to += t) *to = value[i];
            }
        }
    }
}

#if N_LAYERS
/* Return the part of a matrix that begins ``outs`` rows of n after it, ``index`` times: parts have their own panels. */
static matrix part_of(matrix w, uint32_t index, uint32_t outs, uint32_t n)
{
    size_t skipped = (size_t)index * ((outs + 3) / 4 * 4) * n;
    w.data = w.is_int8 ? (const void *)((const int8_t *)w.data + skipped) : (const uint16_t *)w.data + skipped;
    return w;
}
#endif

/* Add a row of a 3 x 3 kernel over one channel: y[t] += w . x[stride t - 1 ... stride t + 1], zeros beyond the ends. */
static void slide(const float *w, const float *x, uint32_t t_in, uint32_t t_out, uint32_t stride, float *y)
{
    uint32_t inside = (t_out - 1) * stride + 1 < t_in ? t_out : t_out - 1;
    y[0] += w[1] * x[0] + (t_in > 1 ? w[2] * x[1] : 0.0f);
    for (uint32_t t = 1; t < inside; t++)
        y[t] += w[0] * x[t * stride - 1] + w[1] * x[t * stride] + w[2] * x[t * stride + 1];
    for (uint32_t t = inside > 1 ? inside : 1; t < t_out; t++)
        y[t] += w[0] * x[t * stride - 1] + w[1] * x[t * stride];
}

/* ---- rows of mel bins ---- */

static const model *model_of(const scene *s)
{
    return &models[s->device];
}

/* Three rows around the centre are in their places; the row in OUT is read no more. */
static void convolve(scene *s, const stage *g, uint32_t centre, int is_last)
{
    uint32_t half_row = g->t_out + 1, channel = half_row + g->t_out, row = g->c_in * channel, k = 0;
    for (uint32_t c = 0; c < g->c_in; c++)
        for (uint32_t i = 0; i < 3; i++) { /* the row above, the centre, the row below */
            int is_there = !(i == 0 && centre == 0) && !(i == 2 && is_last);
            uint32_t x = g->outer + (centre + 2 + i) % 3 * row + c * channel;
            s->at[k++] = is_there ? x : ZEROS;
            s->at[k++] = is_there ? x + half_row : ZEROS;
            s->at[k++] = is_there ? x + 1 : ZEROS;
        }
    product(s, g->project, 0, g->c_out, k, g->t_out, g->affine_project, 1, 0, s->arena + OUT);
}

static void shortcut(scene *s, const stage *g, uint32_t centre, int is_last)
{
    float *out = s->arena + OUT, row[WIDEST];
    uint32_t size = g->c_in * g->t_in, slots = g->shortcut == 2 ? 3 : 2;
    for (uint32_t c = 0; c < g->c_out; c++) {
        const float *x = s->arena + g->outer + c * g->t_in, *same = x + centre % slots * size;
        if (g->shortcut == 2) { /* the average of 3 x 3, in which zeros beyond the edges count */
            static const float ninths[3] = {1.0f / 9, 1.0f / 9, 1.0f / 9};
            memset(row, 0, sizeof row);
            if (centre) slide(ninths, x + (centre + 2) % 3 * size, g->t_in, g->t_out, g->stride_time, row);
            slide(ninths, same, g->t_in, g->t_out, g->stride_time, row);
            if (!is_last) slide(ninths, x + (centre + 1) % 3 * size, g->t_in, g->t_out, g->stride_time, row);
            same = row;
        }
        for (uint32_t t = 0; t < g->t_out; t++) out[c * g->t_out + t] += g->shortcut ? same[t] : 0.0f;
    }
    for (uint32_t i = 0; i < g->c_out * g->t_out; i++) out[i] = out[i] < 0 ? 0 : out[i];
}

static void residual(scene *s, const stage *g, uint32_t centre, int is_last)
{
    uint32_t size = g->wide * g->t_in, above = g->inner + (centre + 2) % 3 * size;
    for (uint32_t c = 0; c < g->wide; c++) { /* into the place of the row above, which is needed no more */
        float w[9], y[WIDEST] = {0}, *x = s->arena + c * g->t_in;
        for (uint32_t i = 0; i < 9; i++) w[i] = value_of(g->depthwise, c * 9 + i);
        if (centre) slide(w, x + above, g->t_in, g->t_out, g->stride_time, y);
        slide(w + 3, x + g->inner + centre % 3 * size, g->t_in, g->t_out, g->stride_time, y);
        if (!is_last) slide(w + 6, x + g->inner + (centre + 1) % 3 * size, g->t_in, g->t_out, g->stride_time, y);
        for (uint32_t t = 0; t < g->t_out; t++) {
            float value = y[t] * g->affine_depthwise[2 * c] + g->affine_depthwise[2 * c + 1];
            s->arena[above + c * g->t_out + t] = value < 0 ? 0 : value;
        }
    }
    use_rows(s, above, g->wide, g->t_out);
    product(s, g->project, 0, g->c_out, g->wide, g->t_out, g->affine_project, 0, 0, s->arena + OUT);
    shortcut(s, g, centre, is_last);
}

#if N_LAYERS
/* Add a row's part of its patches to their tokens (channel, frame). */
static void patches(scene *s, const stage *g, uint32_t row)
{
    const model *m = model_of(s);
    uint32_t part = row % g->stride_mel, mel = row / g->stride_mel;
    if (mel >= GRID_MEL) return;
    float *tokens = s->arena + TOKENS + mel * D_MODEL * GRID_TIME;
    if (!part)
        for (size_t d = 0; d < D_MODEL; d++)
            for (size_t t = 0; t < GRID_TIME; t++)
                tokens[d * GRID_TIME + t] =
                    half(m->patch_bias[d]) + half(m->pos_mel[mel * D_MODEL + d]) + half(m->pos_time[t * D_MODEL + d]);
    use_rows(s, OUT, g->c_in, g->t_in);
    product(s, part_of(g->project, part, D_MODEL, g->c_in), 0, D_MODEL, g->c_in, GRID_TIME, 0, 0, 1, tokens);
}
#endif

/* Give stage ``i`` the row in OUT, or tell it that there are no more. */
static void push(scene *s, size_t i, int is_end)
{
    const stage *g = &model_of(s)->stages[i];
    float *out = s->arena + OUT;
    uint32_t row = s->rows[i];
    if (g->kind == MEAN) {
        for (uint32_t c = 0; c < g->c_in && !is_end; c++)
            for (uint32_t t = 0; t < g->t_in; t++) s->arena[FEATURES + c] += out[c * g->t_in + t];
        return;
    }
#if N_LAYERS
    if (g->kind == PATCHES) {
        if (!is_end) patches(s, g, s->rows[i]++);
        return;
    }
#endif
    if (!is_end) {
        s->rows[i]++;
        if (g->kind == CONVOLUTION) { /* of each channel 0, the odd frames, perhaps 0, then the even ones */
            uint32_t channel = 2 * g->t_out + 1;
            float *to = s->arena + g->outer + row % 3 * g->c_in * channel;
            for (uint32_t c = 0; c < g->c_in; c++, to += channel, out += g->t_in) {
                to[0] = to[g->t_out] = 0;
                for (uint32_t t = 0; t < g->t_in; t++) to[t % 2 ? 1 + t / 2 : g->t_out + 1 + t / 2] = out[t];
            }
        } else {
            uint32_t size = g->c_in * g->t_in;
            if (g->shortcut)
                memcpy(s->arena + g->outer + row % (g->shortcut == 2 ? 3 : 2) * size, out, size * sizeof *out);
            use_rows(s, OUT, g->c_in, g->t_in);
            product(s, g->expand, 0, g->wide, g->c_in, g->t_in, g->affine_expand, 1, 0,
                    s->arena + g->inner + row % 3 * g->wide * g->t_in);
        }
    }
    if (row && (row - 1) % g->stride_mel == 0) { /* the row before has all its neighbours */
        if (g->kind == CONVOLUTION)
            convolve(s, g, row - 1, is_end);
        else
            residual(s, g, row - 1, is_end);
        push(s, i + 1, 0);
    }
    if (is_end) push(s, i + 1, 1);
}

/* Take away a part of each mel bin's mean, and send the log-mel through all stages. */
static void rows_of_log_mel(scene *s)
{
    for (size_t m = 0; m < N_MELS; m++) {
        const float *mel = s->arena + LOG_MEL + m * FRAMES;
        float sum = 0;
        for (size_t t = 0; t < FRAMES; t++) sum += mel[t];
        float share = FREQ_NORM * (sum / FRAMES);
        for (size_t t = 0; t < FRAMES; t++) s->arena[OUT + t] = mel[t] - share;
        push(s, 0, 0);
    }
    push(s, 0, 1);
}

/* ---- Mamba ---- */

#if N_LAYERS
/* 2^x, where x is at most 125; a smaller x than -125 counts as -125. With 1.5 2^23 added, the last bits are x rounded:
   k. A polynomial, off by 9.2e-8 at most before rounding, gives 2^r for the rest, |r| <= 1 / 2, and k is added to its
   exponent. Numbers are compared as integers, without branches, so that compilers can do several at once: as unsigned
   ones, negative numbers are above positive ones, and the lower the higher. */
static float power_of_2(float x)
{
    uint32_t bits = bits_of(x), lowest = 0xc2fa0000u; /* -125 */
    x = of_bits(bits < lowest ? bits : lowest);
    float shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f), p = 0.0013264727f;
    p = p * r + 0.0096715128f;
    p = p * r + 0.0555073375f;
    p = p * r + 0.240222421f;
    p = p * r + 0.693146978f;
    p = p * r + 1.0f;
    return of_bits(bits_of(p) + (bits_of(shifted) << 23));
}

/* e^x; an x beyond 86 or -86, where float32 nearly ends, counts as these. */
static float exp_of(float x)
{
    int32_t bits = (int32_t)bits_of(x * LOG2_E), highest = 0x42fa0000; /* 125; negative numbers are below it */
    return power_of_2(of_bits((uint32_t)(bits < highest ? bits : highest)));
}

/* log(1 + e^x) = max(x, 0) + log(1 + e) with e = e^-|x|; a polynomial of e in 0 ... 1, whose relative error is
   at most 2.2e-7 before rounding. */
static float softplus(float x)
{
    float e = power_of_2(-LOG2_E * fabsf(x)), p = -0.0087789395f;
    p = p * e + 0.0449865889f;
    p = p * e + -0.109022842f;
    p = p * e + 0.178472038f;
    p = p * e + -0.245368648f;
    p = p * e + 0.332840636f;
    p = p * e + -0.499981803f;
    p = p * e + 1.0f;
    return 0.5f * (x + fabsf(x)) + p * e;
}

static void silu(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) x[i] = x[i] / (1.0f + exp_of(-x[i]));
}

/* u = conv(x) of one direction, (D_INNER, GRID_TIME); u may be x. */
static void convolve_time(const branch *b, int is_backward, const float *x, float *u)
{
    for (size_t d = 0; d < D_INNER; d++, x += GRID_TIME, u += GRID_TIME) {
        float y[GRID_TIME], bias = half(b->conv_bias[d]);
        float w[D_CONV], scale = scale_of(b->conv, d); /* w[j]: of the sample j steps before */
        for (size_t j = 0; j < D_CONV; j++) w[j] = value_of(b->conv, d * D_CONV + D_CONV - 1 - j) * scale;
        for (size_t t = 0; t < GRID_TIME; t++) {
            size_t before = is_backward ? GRID_TIME - 1 - t : t;
            float sum = bias;
            if (before < D_CONV - 1)
                for (size_t j = 0; j <= before; j++) sum += w[j] * (is_backward ? x[t + j] : x[t - j]);
            else if (is_backward)
                for (size_t j = 0; j < D_CONV; j++) sum += w[j] * x[t + j];
            else
                for (size_t j = 0; j < D_CONV; j++) sum += w[j] * x[t - j];
            y[t] = sum;
        }
        memcpy(u, y, sizeof y);
    }
}

/* Scan one direction: from u (D_INNER, GRID_TIME) and the arena's delta, B, C to y, which may be u, or added to y. Four
   channels at a time, which lie side by side. */
static void scan(scene *s, const branch *b, int is_backward, const float *u, float *y)
{
    const float *low = s->arena + PROJECTED, *B = low + DT_RANK * GRID_TIME, *C = B + D_STATE * GRID_TIME;
    float *delta = s->arena + DELTA, *decay = s->arena + DECAY, *inputs = s->arena + INPUTS;
    for (size_t d0 = 0; d0 < D_INNER; d0 += 4, u += 4 * GRID_TIME, y += 4 * GRID_TIME) {
        size_t high = D_INNER - d0 < 4 ? D_INNER - d0 : 4;
        float a[D_STATE * 4] = {0}, w[DT_RANK * 4] = {0}, bias[4] = {0}, skip[4] = {0};
        for (size_t i = 0; i < high; i++) {
            size_t d = d0 + i;
            bias[i] = half(b->dt_bias[d]), skip[i] = half(b->d[d]);
            for (size_t r = 0; r < DT_RANK; r++) w[4 * r + i] = value_of(b->dt_proj, d * DT_RANK + r) * scale_of(b->dt_proj, d);
            for (size_t n = 0; n < D_STATE; n++) a[4 * n + i] = value_of(b->a_log, d * D_STATE + n) * scale_of(b->a_log, d);
            for (size_t t = 0; t < GRID_TIME; t++) inputs[4 * t + i] = u[i * GRID_TIME + t];
        }
        for (size_t i = 0; i < 4 * D_STATE; i++) a[i] = -LOG2_E * exp_of(a[i]);
        for (size_t t = 0; t < GRID_TIME; t++) {
            four sum = load(bias);
            for (size_t r = 0; r < DT_RANK; r++) sum = plus(sum, scaled(load(w + 4 * r), low[r * GRID_TIME + t]));
            store(delta + 4 * t, sum);
        }
        for (size_t i = 0; i < 4 * GRID_TIME; i++) delta[i] = softplus(delta[i]);
        for (size_t t = 0; t < GRID_TIME; t++)
            for (size_t n = 0; n < 4 * D_STATE; n += 4)
                for (size_t i = 0; i < 4; i++) decay[4 * D_STATE * t + n + i] = power_of_2(delta[4 * t + i] * a[n + i]);
        four h[D_STATE], zero = scaled(load(bias), 0.0f);
        for (size_t n = 0; n < D_STATE; n++) h[n] = zero;
        for (size_t step = 0; step < GRID_TIME; step++) {
            size_t t = is_backward ? GRID_TIME - 1 - step : step;
            four x = load(inputs + 4 * t), input = times(load(delta + 4 * t), x), sum = times(load(skip), x);
            for (size_t n = 0; n < D_STATE; n++) {
                h[n] = plus(times(load(decay + 4 * (D_STATE * t + n)), h[n]), scaled(input, B[n * GRID_TIME + t]));
                sum = plus(sum, scaled(h[n], C[n * GRID_TIME + t]));
            }
            float out[4];
            store(out, sum);
            for (size_t i = 0; i < high; i++) {
                float *to = y + i * GRID_TIME + t;
                *to = is_backward ? *to + out[i] : out[i];
            }
        }
    }
}

/* inner = one of the two parts of in_proj, D_INNER rows, times the norm of tokens x (D_MODEL, GRID_TIME): its weights are
   applied before the sums, and the frames' own factors after them. */
static void project_in(scene *s, const layer *l, uint32_t part, const float *norm, const float *x, const float *factors)
{
    float *inner = s->arena + INNER;
    matrix w = part_of(l->in_proj, part, D_INNER, D_MODEL);
    if (w.scale) w.scale += part * D_INNER;
    use_rows(s, (uint32_t)(x - s->arena), D_MODEL, GRID_TIME);
    product(s, w, norm, D_INNER, D_MODEL, GRID_TIME, 0, 0, 0, inner);
    for (size_t d = 0; d < D_INNER; d++)
        for (size_t t = 0; t < GRID_TIME; t++) inner[d * GRID_TIME + t] *= factors[t];
}

/* Add to a row of tokens x (D_MODEL, GRID_TIME) what the layer makes of it. */
static void mix(scene *s, const layer *l, float *x)
{
    float *inner = s->arena + INNER, *y = s->arena + SCANNED, squares[GRID_TIME] = {0}, norm[D_MODEL];
    for (size_t d = 0; d < D_MODEL; d++) norm[d] = half(l->norm[d]);
    for (size_t d = 0; d < D_MODEL; d++)
        for (size_t t = 0; t < GRID_TIME; t++) squares[t] += x[d * GRID_TIME + t] * x[d * GRID_TIME + t];
    for (size_t t = 0; t < GRID_TIME; t++) squares[t] = 1.0f / sqrtf(squares[t] / D_MODEL + NORM_EPS);
    project_in(s, l, 0, norm, x, squares);
    for (int i = 0; i < 2; i++) {
        float *u = i ? inner : y; /* the second direction needs x no more, and its y is added to the first one's */
        convolve_time(&l->branches[i], i, inner, u);
        silu(u, D_INNER * GRID_TIME);
        use_rows(s, i ? INNER : SCANNED, D_INNER, GRID_TIME);
        product(s, l->branches[i].x_proj, 0, DT_RANK + 2 * D_STATE, D_INNER, GRID_TIME, 0, 0, 0, s->arena + PROJECTED);
        scan(s, &l->branches[i], i, u, y);
    }
    project_in(s, l, 1, norm, x, squares); /* the gate */
    silu(inner, D_INNER * GRID_TIME);
    for (size_t i = 0; i < D_INNER * GRID_TIME; i++) y[i] *= 0.5f * inner[i];
    use_rows(s, SCANNED, D_INNER, GRID_TIME);
    product(s, l->out_proj, 0, D_MODEL, D_INNER, GRID_TIME, 0, 0, 1, x);
}

/* Add to each token what a 3 x 3 kernel of its channel makes of its neighbours, then what the scan of its row adds. */
static void mamba(scene *s, const layer *l)
{
    float *before = s->arena + BEFORE; /* the row above, as it was */
    for (size_t m = 0; m < GRID_MEL; m++) {
        float *row = s->arena + TOKENS + m * D_MODEL * GRID_TIME;
        for (size_t d = 0; d < D_MODEL; d++) {
            float *x = row + d * GRID_TIME, *above = before + d * GRID_TIME, w[9], y[GRID_TIME];
            float bias = half(l->local_bias[d]);
            for (size_t i = 0; i < 9; i++) w[i] = value_of(l->local, d * 9 + i) * scale_of(l->local, d);
            for (size_t t = 0; t < GRID_TIME; t++) y[t] = x[t] + bias;
            if (m) slide(w, above, GRID_TIME, GRID_TIME, 1, y);
            slide(w + 3, x, GRID_TIME, GRID_TIME, 1, y);
            if (m + 1 < GRID_MEL) slide(w + 6, x + D_MODEL * GRID_TIME, GRID_TIME, GRID_TIME, 1, y);
            memcpy(above, x, sizeof y);
            memcpy(x, y, sizeof y);
        }
        mix(s, l, row);
    }
}

static void sum_tokens(scene *s, const float *affine)
{
    memset(s->arena + FEATURES, 0, D_MODEL * sizeof(float));
    for (size_t m = 0; m < GRID_MEL; m++)
        for (size_t d = 0; d < D_MODEL; d++)
            for (size_t t = 0; t < GRID_TIME; t++) {
                float x = s->arena[TOKENS + (m * D_MODEL + d) * GRID_TIME + t] * affine[2 * d] + affine[2 * d + 1];
                s->arena[FEATURES + d] += x < 0 ? 0 : x;
            }
}
#endif

int scene_logits(scene *s, float *logits)
{
    if (s->taken < SCENE_SAMPLES) return 0;
    int refused = s->refused;
    if (!refused) {
        const model *m = model_of(s);
        for (size_t t = FRAMES_OF_CLIP; t < FRAMES; t++)
            for (size_t i = 0; i < N_MELS; i++) s->arena[LOG_MEL + i * FRAMES + t] = SILENCE;
        memset(s->arena, 0, LOG_MEL * sizeof(float));
        rows_of_log_mel(s);
#if N_LAYERS
        for (size_t i = 0; i < N_LAYERS; i++) mamba(s, &m->layers[i]);
        sum_tokens(s, m->affine_features);
#endif
        /* Head and BatchNorm are linear, so the mean over all places can be taken before them. */
        for (size_t i = 0; i < SCENE_CLASSES; i++) {
            float sum = 0;
            for (size_t c = 0; c < N_FEATURES; c++)
                sum += value_of(m->head, i * N_FEATURES + c) * (s->arena[FEATURES + c] / N_PLACES);
            logits[i] = sum * m->affine_head[2 * i] + m->affine_head[2 * i + 1];
        }
    }
    begin(s);
    return refused ? -1 : 1;
}
