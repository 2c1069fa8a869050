/* What the page calls of scene.c, as WebAssembly: one scene, with places for its samples, log-mel and logits. */
#include "scene.c"

#define EXPORT(name) __attribute__((export_name(#name))) name

static scene state;
static float samples[SCENE_SAMPLES], logits[SCENE_CLASSES];

float *EXPORT(samples_at)(void) { return samples; }
float *EXPORT(logits_at)(void) { return logits; }
const float *EXPORT(log_mel_at)(void) { return state.arena + LOG_MEL; }
int EXPORT(log_mel_row)(void) { return FRAMES; }

/* Take the SCENE_SAMPLES samples of a clip; its log-mel, (N_MELS, FRAMES), is then whole until `classify`. */
void EXPORT(listen)(int device)
{
    scene_init(&state);
    scene_set_device(&state, device);
    scene_push(&state, samples, SCENE_SAMPLES);
}

/* As scene_logits. */
int EXPORT(classify)(void)
{
    return scene_logits(&state, logits);
}
