/* A WAV file, or 16-bit PCM from standard input, to scenes: window by window, each of SCENE_SAMPLES samples.

   What is left after the last whole window is not used. Exit code 1 and a line on standard error where something is
   wrong; 2 for a wrong command line. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "scene.h"

enum { FRAMES = 512, MOST_CHANNELS = 64, MOST_BYTES = 4 };
enum { PCM = 1, FLOAT = 3, EXTENSIBLE = 0xfffe };

typedef struct {
    FILE *file;
    const char *name;
    uint32_t left; /* bytes of sound; without meaning for a stream */
    uint32_t bytes, channels; /* of a sample, in a frame */
    int is_float, is_stream;
} sound;

static scene state;

static int fail(const char *name, const char *what)
{
    fprintf(stderr, "error: %s: %s\n", name, what);
    return -1;
}

static uint32_t little(const unsigned char *p, size_t bytes)
{
    uint32_t value = 0;
    for (size_t i = 0; i < bytes; i++) value |= (uint32_t)p[i] << (8 * i);
    return value;
}

static int read_all(sound *w, unsigned char *to, size_t n)
{
    if (fread(to, 1, n, w->file) == n) return 0;
    return fail(w->name, ferror(w->file) ? strerror(errno) : "the file ends early: it is cut short or no WAV file");
}

static int skip(sound *w, uint32_t n)
{
    unsigned char buffer[512];
    while (n) {
        uint32_t part = n < sizeof buffer ? n : (uint32_t)sizeof buffer;
        if (read_all(w, buffer, part)) return -1;
        n -= part;
    }
    return 0;
}

/* Read a WAV file's header up to its sound. Return 0, or -1 after a message. */
static int open_wav(sound *w)
{
    unsigned char head[40];
    int has_format = 0;
    if (read_all(w, head, 12)) return -1;
    if (memcmp(head, "RIFF", 4) || memcmp(head + 8, "WAVE", 4)) return fail(w->name, "no WAV file (RIFF ... WAVE)");
    for (;;) {
        if (read_all(w, head, 8)) return -1;
        uint32_t size = little(head + 4, 4);
        if (!memcmp(head, "data", 4)) {
            if (!has_format) return fail(w->name, "its sound comes before its format");
            if (size % (w->bytes * w->channels)) return fail(w->name, "its sound ends within a sample");
            w->left = size;
            return 0;
        }
        if (memcmp(head, "fmt ", 4)) {
            if (skip(w, size) || (size % 2 && skip(w, 1))) return -1;
            continue;
        }
        uint32_t part = size < sizeof head ? size : (uint32_t)sizeof head;
        if (size < 16) return fail(w->name, "its format is shorter than 16 bytes");
        if (read_all(w, head, part) || skip(w, size - part) || (size % 2 && skip(w, 1))) return -1;
        uint32_t kind = little(head, 2), rate = little(head + 4, 4), block = little(head + 12, 2);
        uint32_t bits = little(head + 14, 2);
        if (kind == EXTENSIBLE && part >= 26) kind = little(head + 24, 2);
        w->channels = little(head + 2, 2);
        w->bytes = bits / 8;
        w->is_float = kind == FLOAT;
        if (!((kind == PCM && (bits == 16 || bits == 24)) || (kind == FLOAT && bits == 32)))
            return fail(w->name, "its samples are not PCM of 16 or 24 bits or float of 32 bits: convert it");
        if (w->channels < 1 || w->channels > MOST_CHANNELS) return fail(w->name, "it has no or more than 64 channels");
        if (block != w->bytes * w->channels) return fail(w->name, "its format contradicts itself (block size)");
        if (rate != SCENE_RATE) {
            fprintf(stderr, "error: %s: its rate is %lu Hz, the model's %lu Hz: resample it, for example with sox -r\n",
                    w->name, (unsigned long)rate, (unsigned long)SCENE_RATE);
            return -1;
        }
        has_format = 1;
    }
}

static float sample(const sound *w, const unsigned char *p)
{
    uint32_t bits = little(p, w->bytes);
    if (w->is_float) {
        float x;
        memcpy(&x, &bits, sizeof x);
        return x;
    }
    uint32_t half = (uint32_t)1 << (8 * w->bytes - 1);
    return ((float)(bits ^ half) - (float)half) / (float)half;
}

/* Read up to FRAMES frames, the mean of their channels. Return how many, 0 at the end, -1 after a message. */
static int read_frames(sound *w, float *to)
{
    static unsigned char buffer[FRAMES * MOST_CHANNELS * MOST_BYTES];
    uint32_t block = w->bytes * w->channels, wanted = FRAMES * block;
    if (!w->is_stream && w->left < wanted) wanted = w->left;
    size_t got = fread(buffer, 1, wanted, w->file);
    if (got < wanted && ferror(w->file)) return fail(w->name, strerror(errno));
    if (got < wanted && !w->is_stream) return fail(w->name, "the file ends early: it is cut short");
    w->left -= (uint32_t)got;
    size_t n = got / block;
    for (size_t i = 0; i < n; i++) {
        float sum = 0;
        for (size_t c = 0; c < w->channels; c++) sum += sample(w, buffer + i * block + c * w->bytes);
        to[i] = sum / (float)w->channels;
    }
    return (int)n;
}

static void print_scenes(const float *logits, unsigned long window, const char *device)
{
    float highest = logits[0], sum = 0;
    int best = 0;
    for (int i = 1; i < SCENE_CLASSES; i++)
        if (logits[i] > highest) highest = logits[best = i];
    for (int i = 0; i < SCENE_CLASSES; i++) sum += expf(logits[i] - highest);
    double start = (double)window * SCENE_SAMPLES / SCENE_RATE;
    printf("%8.2f s  %-20s", start, scene_class_names[best]);
    for (int i = 0; i < SCENE_CLASSES; i++)
        printf("  %s %.3f", scene_class_names[i], (double)(expf(logits[i] - highest) / sum));
    printf("  (%s)\n", device);
}

/* Print the scenes of a sound. Return 0, or -1 after a message. */
static int run(sound *w, int device, int as_logits)
{
    float frames[FRAMES], logits[SCENE_CLASSES];
    unsigned long window = 0;
    int n;
    scene_init(&state);
    scene_set_device(&state, device);
    while ((n = read_frames(w, frames)) > 0)
        for (size_t i = 0; i < (size_t)n;) {
            i += scene_push(&state, frames + i, (size_t)n - i);
            int done = scene_logits(&state, logits);
            if (done < 0) return fail(w->name, "a sample is not finite, or far beyond full scale");
            if (!done) continue;
            if (!as_logits) print_scenes(logits, window, scene_device_names[device]);
            for (int c = 0; as_logits && c < SCENE_CLASSES; c++)
                printf("%.9g%c", (double)logits[c], c + 1 < SCENE_CLASSES ? ' ' : '\n');
            window++;
            if (fflush(stdout)) return fail("standard output", strerror(errno));
        }
    if (!n && !window) return fail(w->name, "it is shorter than one window (scene --sizes prints its samples)");
    return n;
}

static int usage(void)
{
    fprintf(stderr, "usage: scene [--logits] [--device NAME] FILE.wav | -     (-: 16-bit little-endian mono PCM)\n"
                    "       scene --sizes\n");
    return 2;
}

int main(int argc, char **argv)
{
    sound w = {0};
    int as_logits = 0, device = 0;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--sizes")) {
            printf("sizeof(scene) %lu\nsamples of a window %lu at %lu Hz\n", (unsigned long)sizeof state,
                   (unsigned long)SCENE_SAMPLES, (unsigned long)SCENE_RATE);
            return 0;
        }
        if (!strcmp(argv[i], "--logits")) {
            as_logits = 1;
        } else if (!strcmp(argv[i], "--device") && i + 1 < argc) {
            for (device = 0, i++; device < SCENE_DEVICES && strcmp(argv[i], scene_device_names[device]);) device++;
            if (device == SCENE_DEVICES) return fail(argv[i], "there is no model of that name: README.md lists them"), 2;
        } else if (w.name || (argv[i][0] == '-' && argv[i][1])) {
            return usage();
        } else {
            w.name = argv[i];
        }
    }
    if (!w.name) return usage();
    w.is_stream = !strcmp(w.name, "-");
    w.bytes = 2, w.channels = 1;
    w.file = w.is_stream ? stdin : fopen(w.name, "rb");
    if (!w.file) return fail(w.name, strerror(errno)), 1;
    if (w.is_stream) w.name = "standard input";
    return (!w.is_stream && open_wav(&w)) || run(&w, device, as_logits) ? 1 : 0;
}
