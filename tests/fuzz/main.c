/* main.c - a target's program: libFuzzer's driver, with the options of the command line. */
#include "fuzz.h"

int LLVMFuzzerRunDriver(int *argc, char ***argv, int (*target)(const uint8_t *data, size_t size));
const char *__asan_default_options(void);
const char *__ubsan_default_options(void);

/* An allocation that is too large fails, as it does without AddressSanitizer: refusing it is the API's task. */
const char *__asan_default_options(void)
{
    return "allocator_may_return_null=1:max_allocation_size_mb=256:detect_leaks=0";
}

const char *__ubsan_default_options(void)
{
    return "print_stacktrace=1";
}

int main(int argc, char **argv)
{
    return LLVMFuzzerRunDriver(&argc, &argv, LLVMFuzzerTestOneInput);
}
