/* simd.c - every function of kernels/cpu/simd.h, in the form that BTX_VL picks, against plain C (test_simd.py).
 *
 *     cc -DBTX_VL=8 -mavx2 -mfma -mf16c -Icsrc -Ikernels/cpu tests/simd.c -lm && ./a.out
 *
 * Expectations are computed here in double precision or by integers, never by half.h or another form. Where a form
 * gives a value of its own bits must agree; NaNs that arithmetic makes agree as NaNs. A load that must not touch
 * what lies behind it ends at a page that cannot be read, so that touching it ends the program.
 *
 * Prints the name of each check before it runs; the first few disagreements of a check follow it. Exit status 0 when
 * all agree. */
#include <inttypes.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "simd.h"

/* ---- inputs and comparison ---------------------------------------------------------------------- */

enum { RANDOM_VALUES = 200000, MAX_PRINTED = 5 };

static const char *checking;
static int num_failed, num_printed;

static void begin(const char *name)
{
    checking = name;
    num_printed = 0;
    printf("%s\n", name);
    fflush(stdout); /* the last name printed says where a signal came from */
}

static void differ(const char *inputs, uint32_t got, uint32_t expected)
{
    num_failed++;
    if (num_printed++ < MAX_PRINTED)
        printf("    %s(%s) is 0x%08" PRIx32 ", not 0x%08" PRIx32 "\n", checking, inputs, got, expected);
}

static uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint64_t random_state = 42;

static uint32_t random_bits(void)
{
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (uint32_t)((random_state * 2685821657736338717u) >> 32);
}

/* Any bits at all, or a value of ordinary size: sums and products of arbitrary bits mostly over- and underflow. */
static float random_float(void)
{
    uint32_t bits = random_bits();
    return random_bits() % 2 ? float_of(bits) : float_of((bits & 0x83ffffffu) + 0x3e000000u);
}

static const uint32_t special_bits[] = {
    0x00000000, 0x80000000,                         /* zeros */
    0x3f800000, 0xbf800000, 0x3f000000, 0x3fc00000, /* 1, -1, 0.5, 1.5 */
    0xc0200000, 0x40600000, 0x4affffff, 0x33800000, /* -2.5, 3.5, 2^23 - 0.5, 2^-24 */
    0x7f800000, 0xff800000,                         /* infinities */
    0x7fc00000, 0xffc00000, 0x7f800001, 0xff812345, /* NaNs, quiet and signalling */
    0x7fffffff, 0x7f9fffff, 0x00000001, 0x80000001, /* ... and the smallest subnormals */
    0x007fffff, 0x807fffff, 0x00400000, 0x00800000, /* subnormals; the smallest normal */
    0x7f7fffff, 0xff7fffff, 0x7f000000, 0x477fefff, /* the largest; around the largest f16 */
    0x477ff000, 0x477fe000, 0x33000000, 0x33000001, /* ... and around half of its smallest subnormal */
    0x387fffff, 0x38800000, 0x7f7f7fff, 0x7f7f8000, /* its subnormals' end; around the largest bf16 */
};
enum { NUM_SPECIAL = sizeof special_bits / sizeof *special_bits };

/* The i-th of the inputs: special values, then random ones. */
static float input(int i)
{
    return i < NUM_SPECIAL ? float_of(special_bits[i]) : random_float();
}

static int same(float got, float expected)
{
    return bits_of(got) == bits_of(expected) || (isnan(got) && isnan(expected));
}

static void expect(float got, float expected, const char *format, double a, double b, double c)
{
    if (same(got, expected))
        return;
    char inputs[160];
    snprintf(inputs, sizeof inputs, format, a, b, c);
    differ(inputs, bits_of(got), bits_of(expected));
}

static void expect_bits(uint32_t got, uint32_t expected, uint32_t from)
{
    if (got == expected)
        return;
    char inputs[32];
    snprintf(inputs, sizeof inputs, "0x%" PRIx32, from);
    differ(inputs, got, expected);
}

static void expect_bytes(const void *got, const void *expected, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        expect_bits(((const uint8_t *)got)[i], ((const uint8_t *)expected)[i], (uint32_t)i);
}

/* ---- formats of 16 bits, by their definition ---------------------------------------------------- */

typedef struct format {
    int mantissa_bits, bias;
} format;

static const format f16 = {10, 15}, bf16 = {7, 127};

static uint32_t format_infinity(format f)
{
    return 0x7fffu >> f.mantissa_bits << f.mantissa_bits;
}

/* Widening: exact; a NaN keeps its payload, made quiet for f16 (by arithmetic) and as it is for bf16 (by a shift). */
static uint32_t widen(format f, uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, mantissa = half & ((1u << f.mantissa_bits) - 1);
    int exponent = (half & 0x7fff) >> f.mantissa_bits;
    if (exponent == (int)(format_infinity(f) >> f.mantissa_bits)) {
        uint32_t quiet = mantissa != 0 && f.mantissa_bits == 10 ? 0x400000u : 0u;
        return sign | 0x7f800000u | mantissa << (23 - f.mantissa_bits) | quiet;
    }
    double whole = exponent == 0 ? mantissa : mantissa + (1u << f.mantissa_bits);
    double value = ldexp(whole, (exponent == 0 ? 1 : exponent) - f.bias - f.mantissa_bits);
    return sign | bits_of((float)value);
}

/* Rounding: to nearest, ties to even; what is too large becomes infinity; a NaN keeps the upper part of its payload,
 * made quiet. */
static uint16_t narrow(format f, float value)
{
    uint32_t sign = bits_of(value) >> 16 & 0x8000u;
    if (isnan(value)) {
        uint32_t payload = (bits_of(value) & 0x7fffffu) >> (23 - f.mantissa_bits);
        return (uint16_t)(sign | format_infinity(f) | payload | 1u << (f.mantissa_bits - 1));
    }
    double magnitude = fabs((double)value);
    int exponent = magnitude > 0 && isfinite(magnitude) ? ilogb(magnitude) : 1 - f.bias;
    if (isinf(magnitude) || exponent > f.bias)
        return (uint16_t)(sign | format_infinity(f));
    if (exponent < 1 - f.bias)
        exponent = 1 - f.bias;
    /* In units of the last place; rint rounds ties to even. One too many carries into the exponent, infinity's too. */
    uint32_t units = (uint32_t)rint(ldexp(magnitude, f.mantissa_bits - exponent));
    return (uint16_t)(sign | (((uint32_t)(exponent + f.bias) << f.mantissa_bits) + units - (1u << f.mantissa_bits)));
}

/* ---- memory that ends where it must ------------------------------------------------------------- */

/* The address behind the last byte of a page; the page that follows it cannot be touched. */
static char *edge_of_memory(void)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *pages = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages + page, page, PROT_NONE) != 0) {
        perror("simd: mmap");
        exit(2);
    }
    return pages + page;
}

/* ---- loads and stores --------------------------------------------------------------------------- */

static void check_f32_memory(void)
{
    float *edge = (float *)(void *)edge_of_memory(), from[BTX_VL], to[BTX_VL + 2], *inner = to + 1;
    begin("vf_zero, vf_set1");
    vf_store(inner, vf_zero());
    for (int i = 0; i < BTX_VL; i++)
        expect_bits(bits_of(inner[i]), 0, 0);
    for (int k = 0; k < NUM_SPECIAL; k++) {
        vf_store(inner, vf_set1(input(k)));
        for (int i = 0; i < BTX_VL; i++)
            expect_bits(bits_of(inner[i]), special_bits[k], special_bits[k]);
    }
    begin("vf_load, vf_store");
    for (int k = 0; k < NUM_SPECIAL; k++) {
        for (int i = 0; i < BTX_VL; i++)
            edge[i - BTX_VL] = from[i] = input((k + i) % NUM_SPECIAL);
        to[0] = to[BTX_VL + 1] = 7.0f;
        vf_store(inner, vf_load(edge - BTX_VL));
        expect_bytes(inner, from, sizeof from);
        expect(to[0], 7.0f, "before", 0, 0, 0);
        expect(to[BTX_VL + 1], 7.0f, "behind", 0, 0, 0);
        memset(edge - BTX_VL, 0, sizeof from);
        vf_store(edge - BTX_VL, vf_load(from));
        expect_bytes(edge - BTX_VL, from, sizeof from);
    }
    begin("vf_load_n");
    for (int n = 0; n <= BTX_VL; n++) {
        for (int i = 0; i < n; i++)
            edge[i - n] = float_of(special_bits[(7 * n + i) % NUM_SPECIAL]);
        vf_store(inner, vf_load_n(edge - n, n));
        for (int i = 0; i < BTX_VL; i++)
            expect_bits(bits_of(inner[i]), i < n ? bits_of(edge[i - n]) : 0, (uint32_t)n);
    }
    begin("vf_store_n");
    for (int n = 0; n <= BTX_VL; n++) {
        for (int i = 0; i < BTX_VL; i++)
            from[i] = random_float();
        vf_store_n(edge - n, vf_load(from), n);
        expect_bytes(edge - n, from, (size_t)n * sizeof *from);
        for (int i = 0; i < BTX_VL + 2; i++)
            to[i] = 7.0f;
        vf_store_n(inner, vf_load(from), n);
        for (int i = -1; i <= BTX_VL; i++)
            expect_bits(bits_of(inner[i]), i >= 0 && i < n ? bits_of(from[i]) : bits_of(7.0f), (uint32_t)n);
    }
}

typedef void (*copy_halves)(uint16_t *to, const uint16_t *from, int n);

static void copy_raw(uint16_t *to, const uint16_t *from, int n)
{
    (void)n;
    vf_put_halves(to, vf_halves(from));
}
static void copy_raw_load_n(uint16_t *to, const uint16_t *from, int n)
{
    vf_put_halves(to, vf_halves_n(from, n));
}
static void copy_raw_store_n(uint16_t *to, const uint16_t *from, int n)
{
    vf_put_halves_n(to, vf_halves(from), n);
}
static void copy_f16(uint16_t *to, const uint16_t *from, int n)
{
    (void)n;
    vf_store_f16(to, vf_load_f16(from));
}
static void copy_f16_load_n(uint16_t *to, const uint16_t *from, int n)
{
    vf_store_f16(to, vf_load_f16_n(from, n));
}
static void copy_f16_store_n(uint16_t *to, const uint16_t *from, int n)
{
    vf_store_f16_n(to, vf_load_f16(from), n);
}
static void copy_bf16(uint16_t *to, const uint16_t *from, int n)
{
    (void)n;
    vf_store_bf16(to, vf_load_bf16(from));
}
static void copy_bf16_load_n(uint16_t *to, const uint16_t *from, int n)
{
    vf_store_bf16(to, vf_load_bf16_n(from, n));
}
static void copy_bf16_store_n(uint16_t *to, const uint16_t *from, int n)
{
    vf_store_bf16_n(to, vf_load_bf16(from), n);
}

/* Halves go through a load and a store and come out as they were. Each in turn works at the edge of memory. */
static void check_half_memory(const char *name, copy_halves whole, copy_halves load_n, copy_halves store_n)
{
    uint16_t *edge = (uint16_t *)(void *)edge_of_memory(), from[BTX_VL], to[BTX_VL + 2], *inner = to + 1;
    begin(name);
    for (int n = 0; n <= BTX_VL; n++) {
        for (int i = 0; i < BTX_VL; i++) /* finite, so that widening and rounding gives the same bits */
            from[i] = (uint16_t)(random_bits() & 0xbbffu);
        memcpy(edge - n, from, (size_t)n * sizeof *from);
        load_n(inner, edge - n, n);
        for (int i = 0; i < BTX_VL; i++)
            expect_bits(inner[i], i < n ? from[i] : 0, (uint32_t)n);
        memset(edge - n, 0, (size_t)n * sizeof *from);
        store_n(edge - n, from, n);
        expect_bytes(edge - n, from, (size_t)n * sizeof *from);
        for (int i = 0; i < BTX_VL + 2; i++)
            to[i] = 7;
        store_n(inner, from, n);
        for (int i = -1; i <= BTX_VL; i++)
            expect_bits(inner[i], i >= 0 && i < n ? from[i] : 7, (uint32_t)n);
    }
    memcpy(edge - BTX_VL, from, sizeof from);
    to[0] = to[BTX_VL + 1] = 7;
    whole(inner, edge - BTX_VL, BTX_VL);
    for (int i = -1; i <= BTX_VL; i++)
        expect_bits(inner[i], i >= 0 && i < BTX_VL ? from[i] : 7, BTX_VL);
    memset(edge - BTX_VL, 0, sizeof from);
    whole(edge - BTX_VL, from, BTX_VL);
    expect_bytes(edge - BTX_VL, from, sizeof from);
}

/* ---- arithmetic --------------------------------------------------------------------------------- */

typedef enum operation { ADD, SUB, MUL, DIV, MAX, MIN, NUM_OPERATIONS } operation;

static const char *const operation_names[NUM_OPERATIONS] = {"vf_add", "vf_sub", "vf_mul", "vf_div", "vf_max", "vf_min"};

static vf compute(operation op, vf a, vf b)
{
    switch (op) {
    case ADD:
        return vf_add(a, b);
    case SUB:
        return vf_sub(a, b);
    case MUL:
        return vf_mul(a, b);
    case DIV:
        return vf_div(a, b);
    case MAX:
        return vf_max(a, b);
    default:
        return vf_min(a, b);
    }
}

/* In double: its 53 bits are more than twice 24 and two, so rounding twice is rounding once for these four. */
static float expected_of(operation op, float a, float b)
{
    switch (op) {
    case ADD:
        return (float)((double)a + (double)b);
    case SUB:
        return (float)((double)a - (double)b);
    case MUL:
        return (float)((double)a * (double)b);
    case DIV:
        return (float)((double)a / (double)b);
    case MAX:
        return isgreater(a, b) ? a : b;
    default:
        return isless(a, b) ? a : b;
    }
}

static void check_operation(operation op)
{
    float a[BTX_VL], b[BTX_VL], got[BTX_VL];
    const int pairs = NUM_SPECIAL * NUM_SPECIAL;
    begin(operation_names[op]);
    for (int k = 0; k < pairs + RANDOM_VALUES; k += BTX_VL) {
        for (int i = 0; i < BTX_VL; i++) {
            a[i] = k + i < pairs ? input((k + i) / NUM_SPECIAL) : random_float();
            b[i] = k + i < pairs ? input((k + i) % NUM_SPECIAL) : random_float();
        }
        vf_store(got, compute(op, vf_load(a), vf_load(b)));
        for (int i = 0; i < BTX_VL; i++) {
            float expected = expected_of(op, a[i], b[i]);
            if (op == MAX || op == MIN) /* a choice: the bits of a NaN too */
                expect_bits(bits_of(got[i]), bits_of(expected), bits_of(a[i]));
            else
                expect(got[i], expected, "%.9g, %.9g", a[i], b[i], 0);
        }
    }
}

static void check_fma(void)
{
    float a[BTX_VL], b[BTX_VL], c[BTX_VL], got[BTX_VL];
    const int triples = NUM_SPECIAL * NUM_SPECIAL * NUM_SPECIAL;
    begin("vf_fma");
    for (int k = 0; k < triples + RANDOM_VALUES; k += BTX_VL) {
        for (int i = 0; i < BTX_VL; i++) {
            int special = k + i < triples;
            a[i] = special ? input((k + i) / NUM_SPECIAL / NUM_SPECIAL) : random_float();
            b[i] = special ? input((k + i) / NUM_SPECIAL % NUM_SPECIAL) : random_float();
            c[i] = special ? input((k + i) % NUM_SPECIAL) : random_float();
            if (!special && random_bits() % 2) /* much cancels */
                c[i] = -(a[i] * b[i]);
        }
        vf_store(got, vf_fma(vf_load(a), vf_load(b), vf_load(c)));
        for (int i = 0; i < BTX_VL; i++) {
            float product = a[i] * b[i];
            if (BTX_VL == 1 && same(got[i], product + c[i])) /* that form need not fuse */
                continue;
            expect(got[i], fmaf(a[i], b[i], c[i]), "%.9g, %.9g, %.9g", a[i], b[i], c[i]);
        }
    }
}

static void check_reductions(void)
{
    float lanes[BTX_VL];
    begin("vf_reduce_add");
    for (int k = 0; k < RANDOM_VALUES / BTX_VL; k++) {
        double sum = 0; /* of whole numbers, exact in any order */
        for (int i = 0; i < BTX_VL; i++) {
            lanes[i] = (float)(int)(random_bits() % 100001) - 50000.0f;
            sum += lanes[i];
        }
        expect(vf_reduce_add(vf_load(lanes)), (float)sum, "%.9g, ...", lanes[0], 0, 0);
    }
    for (int i = 0; i < BTX_VL; i++) {
        for (int k = 0; k < BTX_VL; k++)
            lanes[k] = 1.0f;
        lanes[i] = NAN;
        expect(vf_reduce_add(vf_load(lanes)), NAN, "NaN in lane %g", i, 0, 0);
        lanes[i] = -INFINITY;
        expect(vf_reduce_add(vf_load(lanes)), -INFINITY, "-infinity in lane %g", i, 0, 0);
    }
    begin("vf_reduce_max");
    for (int k = 0; k < RANDOM_VALUES / BTX_VL; k++) {
        float max = -INFINITY;
        for (int i = 0; i < BTX_VL; i++) {
            lanes[i] = input(k + 3 * i);
            if (isnan(lanes[i])) /* whose maximum is left open */
                lanes[i] = -INFINITY;
            max = lanes[i] > max ? lanes[i] : max;
        }
        float got = vf_reduce_max(vf_load(lanes));
        if (got != max) /* zeros of either sign are equal */
            expect(got, max, "%.9g, ...", lanes[0], 0, 0);
    }
}

static void check_round(void)
{
    float a[BTX_VL], got[BTX_VL];
    begin("vf_round");
    for (int k = 0; k < NUM_SPECIAL + RANDOM_VALUES; k += BTX_VL) {
        for (int i = 0; i < BTX_VL; i++) {
            a[i] = input(k + i);
            if (k >= NUM_SPECIAL && random_bits() % 2) /* halves, all of which are ties */
                a[i] = (float)((int)(random_bits() % 4001) - 2000) * 0.5f;
            if (BTX_VL == 1 && !(fabsf(a[i]) < 0x1p22f)) /* the portable form's range */
                a[i] = 2.5f;
        }
        vf_store(got, vf_round(vf_load(a)));
        for (int i = 0; i < BTX_VL; i++) {
            if (got[i] != rintf(a[i])) /* zeros of either sign are equal */
                expect(got[i], rintf(a[i]), "%.9g", a[i], 0, 0);
        }
    }
}

static void check_scale2(void)
{
    float a[BTX_VL], n[BTX_VL], got[BTX_VL];
    begin("vf_scale2");
    for (int exponent = -160; exponent <= 160; exponent++) {
        for (int k = 0; k < 64 * BTX_VL; k += BTX_VL) {
            for (int i = 0; i < BTX_VL; i++) {
                do
                    a[i] = input(k + i);
                while (k + i >= NUM_SPECIAL && !(fabsf(a[i]) >= 0x1p-46f));
                if (a[i] != 0 && fabsf(a[i]) < 0x1p-46f)
                    a[i] = 1.0f;
                n[i] = (float)(i % 2 ? exponent : -exponent);
            }
            vf_store(got, vf_scale2(vf_load(a), vf_load(n)));
            for (int i = 0; i < BTX_VL; i++)
                expect(got[i], (float)ldexp((double)a[i], (int)n[i]), "%.9g, %g", a[i], n[i], 0);
        }
    }
}

/* ---- conversions -------------------------------------------------------------------------------- */

static void check_widening(void)
{
    uint16_t halves[BTX_VL];
    float got[BTX_VL];
    begin("vf_from_f16, vf_from_bf16");
    for (uint32_t k = 0; k < 0x10000; k += BTX_VL) {
        for (int i = 0; i < BTX_VL; i++)
            halves[i] = (uint16_t)(k + (uint32_t)i);
        vf_store(got, vf_from_f16(vf_halves(halves)));
        for (int i = 0; i < BTX_VL; i++)
            expect_bits(bits_of(got[i]), widen(f16, halves[i]), halves[i]);
        vf_store(got, vf_from_bf16(vf_halves(halves)));
        for (int i = 0; i < BTX_VL; i++)
            expect_bits(bits_of(got[i]), widen(bf16, halves[i]), halves[i]);
    }
}

static void check_narrowing_of(const float *values)
{
    uint16_t got[BTX_VL];
    vf_put_halves(got, vf_to_f16(vf_load(values)));
    for (int i = 0; i < BTX_VL; i++)
        expect_bits(got[i], narrow(f16, values[i]), bits_of(values[i]));
    vf_put_halves(got, vf_to_bf16(vf_load(values)));
    for (int i = 0; i < BTX_VL; i++)
        expect_bits(got[i], narrow(bf16, values[i]), bits_of(values[i]));
}

static void check_narrowing(void)
{
    float values[BTX_VL];
    begin("vf_to_f16, vf_to_bf16");
    for (int k = 0; k < NUM_SPECIAL + 4 * RANDOM_VALUES; k += BTX_VL) {
        for (int i = 0; i < BTX_VL; i++)
            values[i] = input(k + i);
        check_narrowing_of(values);
    }
    /* Every value of either format, the tie behind it, and their neighbours in f32. */
    const format formats[2] = {f16, bf16};
    for (int f = 0; f < 2; f++) {
        uint32_t bits[6];
        int used = 0;
        for (uint32_t half = 0; half < 0x10000; half++) {
            uint32_t value = widen(formats[f], (uint16_t)half);
            float next = float_of(widen(formats[f], (uint16_t)(half + 1)));
            float tie = (float)(((double)float_of(value) + (double)next) / 2);
            bits[0] = value - 1, bits[1] = value, bits[2] = value + 1;
            bits[3] = bits_of(tie) - 1, bits[4] = bits_of(tie), bits[5] = bits_of(tie) + 1;
            for (int j = 0; j < 6; j++) {
                values[used++] = float_of(bits[j]);
                if (used == BTX_VL) {
                    check_narrowing_of(values);
                    used = 0;
                }
            }
        }
    }
}

static void check_pairs(void)
{
    uint32_t cells[BTX_VL], low[BTX_VL], high[BTX_VL];
    float from[BTX_VL];
    begin("vf_bf16_low, vf_bf16_high");
    for (int k = 0; k < NUM_SPECIAL + RANDOM_VALUES; k += BTX_VL) {
        for (int i = 0; i < BTX_VL; i++)
            cells[i] = k + i < NUM_SPECIAL ? special_bits[k + i] : random_bits();
        memcpy(from, cells, sizeof from);
        vf_store(from, vf_bf16_low(vf_load(from)));
        memcpy(low, from, sizeof from);
        memcpy(from, cells, sizeof from);
        vf_store(from, vf_bf16_high(vf_load(from)));
        memcpy(high, from, sizeof from);
        for (int i = 0; i < BTX_VL; i++) {
            expect_bits(low[i], cells[i] % 0x10000u * 0x10000u, cells[i]);
            expect_bits(high[i], cells[i] / 0x10000u * 0x10000u, cells[i]);
        }
    }
}

/* ---- exp ---------------------------------------------------------------------------------------- */

static void check_exp2_of(const float *t, float reference)
{
    float got[BTX_VL], other[BTX_VL];
    vf_store(got, vf_exp2_from(vf_load(t), vf_set1(reference)));
    vf_store(other, vf_exp2_from(vf_load(t), vf_set1(reference - 3.0f)));
    for (int i = 0; i < BTX_VL; i++) {
        double power = (double)t[i] - (double)reference, exact = exp2(power);
        if (!isfinite(t[i]) || power < -150.0 || power > 128.0) {
            float limit = isnan(t[i]) ? NAN : power < 0.0 ? 0.0f : INFINITY;
            if ((power > 128.0 || power < -152.0 || isnan(t[i])) && !(isinf(t[i]) && isnan(got[i])))
                expect(got[i], limit, "%.9g, %g", t[i], reference, 0);
            continue;
        }
        /* Relatively, and by half of the smallest subnormal where the result is one. */
        int overflows = exact > 0x1.fffff0p127 && isinf(got[i]);
        if (!overflows && !(fabs((double)got[i] - exact) <= exact * 0x1p-22 + 0x1p-149))
            expect(got[i], (float)exact, "%.9g, %g", t[i], reference, 0);
        /* Another reference: the same significand. */
        if (power > -120.0 && power < 120.0)
            expect(other[i], got[i] * 8.0f, "%.9g, %g - 3", t[i], reference, 0);
    }
}

/* The polynomial alone, and powers without a reference: the same bits, and NaN of NaN. */
static void check_exp2_normal(const float *t)
{
    float limited[BTX_VL], fractions[BTX_VL], part[BTX_VL], got[BTX_VL], expected[BTX_VL];
    for (int i = 0; i < BTX_VL; i++) {
        limited[i] = fabsf(t[i]) <= 126.0f || isnan(t[i]) ? t[i] : t[i] < 0.0f ? -126.0f : 126.0f;
        fractions[i] = isnan(t[i]) ? t[i] : limited[i] - rintf(limited[i]);
    }
    vf_store(part, vf_exp2_fraction(vf_load(fractions)));
    vf_store(got, vf_exp2_normal(vf_load(limited)));
    vf_store(expected, vf_exp2_from(vf_load(limited), vf_zero()));
    for (int i = 0; i < BTX_VL; i++) {
        double exact = exp2((double)fractions[i]);
        expect(got[i], expected[i], "%.9g, without a reference", limited[i], 0, 0);
        if (!(fabs((double)part[i] - exact) <= exact * 0x1p-22) && !isnan(t[i]))
            expect(part[i], (float)exact, "%.9g, a fraction", fractions[i], 0, 0);
        if (isnan(t[i]))
            expect(got[i], NAN, "NaN", 0, 0, 0);
    }
}

static void check_exp2(void)
{
    float t[BTX_VL];
    begin("vf_exp2_from, vf_exp2_fraction, vf_exp2_normal");
    for (int k = 0; k < NUM_SPECIAL + RANDOM_VALUES; k += BTX_VL) {
        for (int i = 0; i < BTX_VL; i++)
            t[i] = input(k + i);
        check_exp2_of(t, (float)(k % 64 - 32));
        check_exp2_normal(t);
    }
    /* Every 1999th float from 0 to past where it overflows, and as far on the other side. */
    int used = 0;
    for (uint32_t bits = 0; bits < bits_of(170.0f); bits += 1999) {
        for (uint32_t sign = 0; sign < 2; sign++) {
            t[used++] = float_of(bits | sign << 31);
            if (used == BTX_VL) {
                check_exp2_of(t, 0.0f);
                check_exp2_normal(t);
                used = 0;
            }
        }
    }
}

static void check_select(void)
{
    float switches[BTX_VL], a[BTX_VL], b[BTX_VL], got[BTX_VL];
    begin("vf_select_nonzero");
    for (int k = 0; k < NUM_SPECIAL + RANDOM_VALUES; k += BTX_VL) {
        for (int i = 0; i < BTX_VL; i++) {
            switches[i] = k % 3 ? input(k + i) : float_of(random_bits() << 31);
            a[i] = random_float();
            b[i] = random_float();
        }
        vf_store(got, vf_select_nonzero(vf_load(switches), vf_load(a), vf_load(b)));
        for (int i = 0; i < BTX_VL; i++) {
            uint32_t expected = bits_of(switches[i]) << 1 != 0 ? bits_of(a[i]) : bits_of(b[i]);
            if (bits_of(got[i]) != expected)
                expect(got[i], float_of(expected), "%.9g, %.9g, %.9g", switches[i], a[i], b[i]);
        }
    }
}

/* Each sum right, and the same bits wherever the vector stands. */
static void check_reduce_each(void)
{
    float values[BTX_VL][BTX_VL], got[BTX_VL], moved[BTX_VL];
    begin("vf_reduce_add_each");
    for (int k = 0; k < RANDOM_VALUES / BTX_VL / BTX_VL; k++) {
        vf a[BTX_VL], b[BTX_VL];
        for (int i = 0; i < BTX_VL; i++) {
            for (int j = 0; j < BTX_VL; j++)
                values[i][j] = (float)(random_bits() >> 8) * 0x1p-24f;
        }
        for (int i = 0; i < BTX_VL; i++) {
            a[i] = vf_load(values[i]);
            b[i] = vf_load(values[(i + k) % BTX_VL]);
        }
        vf_store(got, vf_reduce_add_each(a));
        vf_store(moved, vf_reduce_add_each(b));
        for (int i = 0; i < BTX_VL; i++) {
            double exact = 0.0;
            for (int j = 0; j < BTX_VL; j++)
                exact += (double)values[i][j];
            if (!(fabs((double)got[i] - exact) <= exact * 4 * 0x1p-24))
                expect(got[i], (float)exact, "values of %g", i, 0, 0);
            if (bits_of(moved[i]) != bits_of(got[(i + k) % BTX_VL]))
                expect(moved[i], got[(i + k) % BTX_VL], "values moved to %g", i, 0, 0);
        }
    }
}

static void check_transpose(void)
{
    begin("vf_transpose");
    for (int k = 0; k < RANDOM_VALUES / BTX_VL / BTX_VL; k++) {
        float values[BTX_VL][BTX_VL], got[BTX_VL];
        vf a[BTX_VL];
        for (int i = 0; i < BTX_VL; i++) {
            for (int j = 0; j < BTX_VL; j++)
                values[i][j] = float_of(random_bits() & 0xff7fffffu); /* no NaN, whose bits scalar code may change */
            a[i] = vf_load(values[i]);
        }
        vf_transpose(a);
        for (int i = 0; i < BTX_VL; i++) {
            vf_store(got, a[i]);
            for (int j = 0; j < BTX_VL; j++) {
                if (bits_of(got[j]) != bits_of(values[j][i]))
                    expect(got[j], values[j][i], "lane %g of vector %g", j, i, 0);
            }
        }
    }
}

int main(void)
{
    check_f32_memory();
    check_half_memory("vf_halves, vf_halves_n, vf_put_halves, vf_put_halves_n", copy_raw, copy_raw_load_n,
                      copy_raw_store_n);
    check_half_memory("vf_load_f16, vf_load_f16_n, vf_store_f16, vf_store_f16_n", copy_f16, copy_f16_load_n,
                      copy_f16_store_n);
    check_half_memory("vf_load_bf16, vf_load_bf16_n, vf_store_bf16, vf_store_bf16_n", copy_bf16, copy_bf16_load_n,
                      copy_bf16_store_n);
    for (int op = 0; op < NUM_OPERATIONS; op++)
        check_operation((operation)op);
    check_fma();
    check_reductions();
    check_round();
    check_scale2();
    check_widening();
    check_narrowing();
    check_pairs();
    check_exp2();
    check_select();
    check_reduce_each();
    check_transpose();
    begin("vf_prefetch");
    vf_prefetch((const char *)NULL); /* any address is fine */
    vf_prefetch(edge_of_memory());
    printf("%d lanes: %d failed\n", BTX_VL, num_failed);
    return num_failed != 0;
}
