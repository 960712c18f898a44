/* coverage.c - what GCC tells of the blocks that run, as libFuzzer wants to hear it.
 *
 * -fsanitize-coverage=trace-pc calls __sanitizer_cov_trace_pc() in every basic block; libFuzzer counts in arrays that
 * Clang makes, and ignores that call. Here each place that calls for the first time gets the next counter of one array,
 * which libFuzzer knows from the start (linked with -Wl,--wrap=__sanitizer_cov_trace_pc). Not instrumented itself. */
#include <stdatomic.h>
#include <stdint.h>

enum { MAX_PLACES = 1 << 15, MAX_CODE = 1 << 24 };

static uint8_t counters[MAX_PLACES];
static uintptr_t places[MAX_PLACES][2];     /* address, flags: Clang's table */
static _Atomic uint16_t place_of[MAX_CODE]; /* by distance from the start of this program or library; 0: not seen */
static _Atomic uint32_t num_places = 1;     /* the first counter stays unused */

extern const char __ehdr_start __attribute__((visibility("hidden")));

void __sanitizer_cov_8bit_counters_init(uint8_t *begin, uint8_t *end);
void __sanitizer_cov_pcs_init(const uintptr_t *begin, const uintptr_t *end);
void __wrap___sanitizer_cov_trace_pc(void);
void __sanitizer_cov_trace_cmpf(float a, float b);
void __sanitizer_cov_trace_cmpd(double a, double b);

void __wrap___sanitizer_cov_trace_pc(void)
{
    const uintptr_t caller = (uintptr_t)__builtin_return_address(0), at = caller - (uintptr_t)&__ehdr_start;
    if (at >= MAX_CODE)
        return;
    uint32_t place = atomic_load_explicit(&place_of[at], memory_order_relaxed);
    if (place == 0) {
        place = atomic_fetch_add(&num_places, 1);
        if (place >= MAX_PLACES)
            return;
        atomic_store_explicit(&place_of[at], (uint16_t)place, memory_order_relaxed);
        places[place][0] = caller;
    }
    counters[place]++;
}

/* GCC's alone: libFuzzer looks at integers. */
void __sanitizer_cov_trace_cmpf(float a, float b)
{
    (void)a, (void)b;
}

void __sanitizer_cov_trace_cmpd(double a, double b)
{
    (void)a, (void)b;
}

__attribute__((constructor)) static void introduce_counters(void)
{
    __sanitizer_cov_8bit_counters_init(counters, counters + MAX_PLACES);
    __sanitizer_cov_pcs_init(places[0], places[MAX_PLACES]);
}
