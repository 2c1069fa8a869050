/* The scene of a clip of sound: init, push samples, get logits. Made by `python -m dcase.export --format c`.

   One `scene` per stream of sound holds all memory that changes. Nothing is allocated, nothing is global but constants,
   and the C library's math.h and string.h are all that is needed. */
#ifndef SCENE_H
#define SCENE_H

#include <stddef.h>
#include <stdint.h>

#define SCENE_RATE @RATE@ /* Hz, of the samples that are pushed */
#define SCENE_SAMPLES @SAMPLES@ /* of a clip */
#define SCENE_CLASSES @CLASSES@
#define SCENE_DEVICES @DEVICES@ /* models: the general one, 0, and one for each device that has its own */
#define SCENE_LOUDEST 1e9f /* samples beyond this, infinite ones and NaN are not taken; full scale is 1 */

extern const char *const scene_class_names[SCENE_CLASSES];
extern const char *const scene_device_names[SCENE_DEVICES];

/* Its members are of no concern outside scene.c. */
typedef struct {
    float arena[@ARENA@];
    float history[@HISTORY@]; /* the resampler's last input samples, twice */
    uint32_t at[@LONGEST@]; /* where in the arena the rows are that a product sums */
    uint32_t rows[@STAGES@]; /* that each stage has taken */
    uint32_t taken, resampled, frames; /* of this clip: samples, samples at the model's rate, frames */
    uint32_t phase, wanted; /* of the next resampled sample: its kernel, and the last input sample it needs */
    int32_t device;
    int32_t refused; /* whether a sample of this clip was not taken */
} scene;

/* Begin a clip with the general model. */
void scene_init(scene *s);

/* Choose the model: 0 is the general one. Return 0, or -1 where there is no such model. The choice holds until the next
   one; it takes effect at scene_logits, also for samples that were pushed before. */
int scene_set_device(scene *s, int device);

/* Take samples, full scale 1 (or 32768), until the clip is full; return how many were taken. */
size_t scene_push(scene *s, const float *samples, size_t n);
size_t scene_push_int16(scene *s, const int16_t *samples, size_t n);

/* Write SCENE_CLASSES logits and begin the next clip. Return 1; 0, with nothing done, where the clip is not full yet; -1,
   without logits, where a sample of the clip was not finite or beyond SCENE_LOUDEST: that clip is dropped. */
int scene_logits(scene *s, float *logits);

#endif
