/* Runs scene.c on a bare Cortex-M7, QEMU's board mps2-an500, and prints what mcu.py reads: a name and a word in hex in
   each line. QEMU loads the ELF file's sections to where they belong, so there is no start-up code.

   CLIP: a file of SCENE_SAMPLES samples, int16. With -icount shift=0 QEMU's clock advances by 1 ns for each instruction,
   and the board's timer counts at 25 MHz: one tick is 40 instructions. */
#include "scene.h"

enum { PAINT = 0x5ca1ab1e, PAINTED = 16384 }; /* words of stack */

__asm__(".section .rodata\n.balign 2\nclip: .incbin \"" CLIP "\"\n");
extern const int16_t clip[];

static scene state;
static uint32_t stack[PAINTED];
static volatile uint32_t *const timer = (volatile uint32_t *)0x40000000; /* control, value, reload */

static void semihosting(uint32_t operation, const void *argument)
{
    register uint32_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
}

static void print(const char *name, uint32_t word)
{
    char text[10] = " ";
    for (int i = 0; i < 8; i++) text[1 + i] = "0123456789abcdef"[word >> (28 - 4 * i) & 15];
    text[9] = 0;
    semihosting(4, name), semihosting(4, text), semihosting(4, "\n");
}

static void run(void)
{
    scene_init(&state);
    print("sizeof", sizeof state);
    for (int device = 0; device < SCENE_DEVICES; device++) {
        float logits[SCENE_CLASSES];
        uint32_t word;
        scene_set_device(&state, device);
        timer[0] = 0, timer[1] = 0xffffffff, timer[0] = 1;
        size_t taken = scene_push_int16(&state, clip, SCENE_SAMPLES);
        uint32_t after_push = timer[1];
        int done = scene_logits(&state, logits);
        uint32_t after_logits = timer[1];
        print("push", 0xffffffff - after_push), print("logits", after_push - after_logits);
        if (taken != SCENE_SAMPLES || done != 1) return;
        for (int i = 0; i < SCENE_CLASSES; i++) {
            __builtin_memcpy(&word, &logits[i], sizeof word);
            print("logit", word);
        }
    }
    uint32_t untouched = 0;
    while (untouched < PAINTED && stack[untouched] == PAINT) untouched++;
    print("stack", 4 * (PAINTED - untouched));
    print("done", 1);
}

static void reset(void)
{
    *(volatile uint32_t *)0xe000ed88 |= 0xf << 20; /* switch the floating-point unit on */
    __asm__ volatile("dsb\nisb" ::: "memory");
    uint32_t *here = __builtin_frame_address(0);
    for (uint32_t *p = stack; p < here - 16; p++) *p = PAINT;
    run();
    semihosting(0x18, (void *)0x20026); /* the program has ended */
}

static void fault(void)
{
    print("fault", *(volatile uint32_t *)0xe000ed28);
    semihosting(0x18, (void *)0x20023);
}

__attribute__((used, section(".vectors"))) static const void *const vectors[] = {stack + PAINTED, reset, fault, fault,
                                                                                 fault, fault, fault};
