/* dispatch.c: chooses the variant of the kernels, and calls a kernel by its number. */
#include <string.h>

typedef void real;
#include "../threads.h"
#include "../tinygpt.h"

typedef void (*const kernel)(const void *args);
extern kernel tinygpt_f32_base[], tinygpt_f64_base[];
#ifdef __x86_64__
extern kernel tinygpt_f32_avx2[], tinygpt_f64_avx2[], tinygpt_f32_avx512[], tinygpt_f64_avx512[];
extern kernel tinygpt_f32_avx512bf16[];
#endif

#define NUMBER(op) OP_##op,
enum { OPS(NUMBER) };

static kernel *tables[2] = {tinygpt_f32_base, tinygpt_f64_base};

static int use(const char *choice, const char *name, int supported, kernel *f32, kernel *f64)
{
    if (!supported || (choice && strcmp(choice, name)))
        return 0;
    tables[0] = f32, tables[1] = f64;
    return 1;
}

const char *tinygpt_choose_isa(const char *name)
{
#ifdef __x86_64__
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    const int bfloat16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (use(name, "avx512bf16", bfloat16, tinygpt_f32_avx512bf16, tinygpt_f64_avx512))
        return "avx512bf16";
    if (use(name, "avx512", avx512, tinygpt_f32_avx512, tinygpt_f64_avx512))
        return "avx512";
    if (use(name, "avx2", avx2, tinygpt_f32_avx2, tinygpt_f64_avx2))
        return "avx2";
#endif
    return use(name, "base", 1, tinygpt_f32_base, tinygpt_f64_base) ? "base" : NULL;
}

/* A replay reads the length of a KV cache at every call; Python checked the first one only. */
static int has_room(const struct append_rows *a)
{
    return *(const int64_t *)a->length >= (int64_t)a->T && *(const int64_t *)a->length <= (int64_t)a->S;
}

int tinygpt_run(int op, int is_double, const void *args)
{
    if (op == OP_append_rows && !has_room(args))
        return 2;
    const size_t before = memory_failures();
    tables[is_double][op](args);
    if (op == OP_check_ids && *(const int32_t *)((const struct check_ids *)args)->outside)
        return 2;
    return memory_failures() != before;
}

int tinygpt_run_all(const struct call *calls, size_t n)
{
    int status = 0;
    for (size_t i = 0; i < n && !status; i++)
        status = tinygpt_run(calls[i].op, calls[i].is_double, calls[i].args);
    return status;
}
