/* operations.cpp - every operation of the CUDA backend's table against plain double arithmetic, on random boundaries.
 *
 *     operations [first seed] [number of seeds] [1: stop at the first case that fails]
 *
 * It sees the backend through btx.h alone, so the same program tests the kernels on a GPU (built with nvcc), under
 * compute-sanitizer, and on the host (tests/emulation/). Everything uploaded is surrounded by NaN and everything
 * returned is looked at, including what must not have changed. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <string>
#include <vector>

#include "btx.h"
#include "half.h"

extern "C" const btx_backend btx_cuda_backend;
static const btx_backend *const backend = &btx_cuda_backend;

static int64_t num_checks, num_failures;
static std::string description; /* of the case under way */

__attribute__((format(printf, 2, 3))) static void check(bool right, const char *format, ...)
{
    num_checks++;
    if (right)
        return;
    if (num_failures++ < 20) {
        va_list arguments;
        va_start(arguments, format);
        printf("failed: ");
        vprintf(format, arguments);
        va_end(arguments);
        printf("\n    %s\n", description.c_str());
    }
}

static void must(btx_status status, const btx_error &error)
{
    if (status == BTX_OK)
        return;
    printf("status %d: %s\n    %s\n", (int)status, error.message, description.c_str());
    exit(2);
}

/* ---- random numbers, elements --------------------------------------------------------------------------------------
 */

struct random_source {
    uint64_t state;
    uint64_t bits()
    {
        uint64_t x = state += 0x9e3779b97f4a7c15ull;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
        x = (x ^ x >> 27) * 0x94d049bb133111ebull;
        return x ^ x >> 31;
    }
    int64_t below(int64_t limit)
    {
        return (int64_t)(bits() >> 1) % limit;
    }
    template <typename T> T one_of(std::initializer_list<T> all)
    {
        return all.begin()[below((int64_t)all.size())];
    }
    float normal() /* nearly: a sum of uniform ones */
    {
        float sum = 0.0f;
        for (int i = 0; i < 6; i++)
            sum += (float)(bits() >> 40) * 0x1p-24f - 0.5f;
        return sum * 1.41421f;
    }
};

static std::vector<float> normals(random_source &random, int64_t count, float scale)
{
    std::vector<float> x((size_t)count);
    for (float &value : x)
        value = random.normal() * scale;
    return x;
}

static double get(const unsigned char *memory, btx_dtype dtype, int64_t i)
{
    if (dtype == BTX_F32)
        return ((const float *)(const void *)memory)[i];
    const uint16_t bits = ((const uint16_t *)(const void *)memory)[i];
    return dtype == BTX_F16 ? btx_f16_to_f32(bits) : btx_bf16_to_f32(bits);
}

static void put(unsigned char *memory, btx_dtype dtype, int64_t i, float value)
{
    if (dtype == BTX_F32)
        ((float *)(void *)memory)[i] = value;
    else
        ((uint16_t *)(void *)memory)[i] = dtype == BTX_F16 ? btx_f32_to_f16(value) : btx_f32_to_bf16(value);
}

/* As an operand of a product with weights of this dtype. */
static double rounded(double x, btx_dtype dtype)
{
    return dtype == BTX_BF16 ? btx_bf16_to_f32(btx_f32_to_bf16((float)x)) : (float)x;
}

/* ---- the device's memory --------------------------------------------------------------------------------------------
 */

static void *executor;

struct memory {
    void *data = nullptr; /* Owned. */
    size_t bytes;
    explicit memory(size_t bytes_) : bytes(bytes_)
    {
        btx_error error;
        must(backend->allocate(0, bytes, &data, &error), error);
    }
    template <typename T> explicit memory(const std::vector<T> &from) : memory(from.size() * sizeof(T))
    {
        upload(from.data());
    }
    memory(const memory &) = delete;
    ~memory()
    {
        backend->release(data);
    }
    void upload(const void *from)
    {
        btx_error error;
        if (bytes > 0 && backend->upload != nullptr)
            must(backend->upload(0, data, from, bytes, &error), error);
        else if (bytes > 0)
            memcpy(data, from, bytes);
    }
    template <typename T> std::vector<T> download() const
    {
        std::vector<T> to(bytes / sizeof(T));
        btx_error error;
        if (!to.empty() && backend->download != nullptr)
            must(backend->download(executor, to.data(), data, bytes, &error), error);
        else if (!to.empty())
            memcpy(to.data(), data, bytes);
        return to;
    }
    float *floats() const
    {
        return (float *)data;
    }
};

/* ---- cases ----------------------------------------------------------------------------------------------------------
 */

/* Of one layer, keys or values or queries: a view into memory that is NaN elsewhere. */
struct pool {
    std::vector<unsigned char> host;
    memory device;
    btx_tensor view;
    int64_t offset; /* of the view, in elements */

    pool(btx_dtype dtype, const int64_t (&shape)[4], const int64_t (&stride)[4], int64_t offset_, int64_t size)
        : host((size_t)size * btx_dtype_size(dtype), 0xff), device(host.size()), offset(offset_)
    {
        view = btx_tensor_contiguous((char *)device.data + (size_t)offset * btx_dtype_size(dtype), dtype, 4, shape);
        view.device.type = backend->device_type;
        memcpy(view.stride, stride, sizeof stride);
    }
    int64_t at(int64_t block, int64_t row, int64_t head, int64_t i) const
    {
        return offset + block * view.stride[0] + row * view.stride[1] + head * view.stride[2] + i * view.stride[3];
    }
    double operator()(int64_t block, int64_t row, int64_t head, int64_t i) const
    {
        return get(host.data(), view.dtype, at(block, row, head, i));
    }
    void set(int64_t block, int64_t row, int64_t head, int64_t i, float value)
    {
        put(host.data(), view.dtype, at(block, row, head, i), value);
    }
};

static pool *make_pool(random_source &random, btx_dtype dtype, int64_t n, int64_t b, int64_t h, int64_t d)
{
    const int64_t shape[4] = {n, b, h, d};
    switch (random.below(5)) {
    case 0: { /* [n, h, b, d] */
        const int64_t stride[4] = {h * b * d, d, b * d, 1};
        return new pool(dtype, shape, stride, 0, n * b * h * d);
    }
    case 1: { /* rows with a gap, off a 16-byte start */
        const int64_t stride[4] = {b * h * (d + 3), h * (d + 3), d + 3, 1};
        return new pool(dtype, shape, stride, 1, n * b * h * (d + 3) + 1);
    }
    case 2: { /* columns */
        const int64_t stride[4] = {h * d * b, 1, d * b, b};
        return new pool(dtype, shape, stride, 0, n * b * h * d);
    }
    case 3: { /* keys | values of a row together: starts on 16 bytes when d does */
        const int64_t stride[4] = {b * h * 2 * d, h * 2 * d, 2 * d, 1};
        return new pool(dtype, shape, stride, d, n * b * h * 2 * d);
    }
    default: {
        const int64_t stride[4] = {b * h * d, h * d, d, 1};
        return new pool(dtype, shape, stride, 0, n * b * h * d);
    }
    }
}

struct boundary {
    int32_t num_layers, num_kv_heads, group, head_dim, top_k;
    int64_t block_size, page_size, pages_per_sequence, max_blocks;
    btx_dtype dtype;
    std::vector<btx_plan_step> steps;
    std::vector<int32_t> block_table, query_table;
    std::vector<pool *> keys, values, queries; /* Owned. */
    std::vector<btx_tensor> key_views, value_views, query_views;
    std::vector<float> inverse_frequencies;
    memory *device_frequencies = nullptr; /* Owned. */
    btx_plan plan;

    int64_t block(const btx_plan_step &step, int64_t position) const
    {
        return block_table[(size_t)(step.sequence * max_blocks + position / block_size)];
    }
    double key(int32_t layer, const btx_plan_step &step, int64_t position, int64_t head, int64_t i) const
    {
        return (*keys[(size_t)layer])(block(step, position), position % block_size, head, i);
    }
    double value(int32_t layer, const btx_plan_step &step, int64_t position, int64_t head, int64_t i) const
    {
        return (*values[(size_t)layer])(block(step, position), position % block_size, head, i);
    }
    int64_t page(const btx_plan_step &step, int64_t position) const
    {
        const int64_t of_ring = position / page_size % pages_per_sequence;
        return query_table[(size_t)(step.sequence * pages_per_sequence + of_ring)];
    }
    double query(int32_t layer, const btx_plan_step &step, int64_t position, int64_t head, int64_t i) const
    {
        return (*queries[(size_t)layer])(page(step, position), position % page_size, head, i);
    }
    ~boundary()
    {
        for (auto *all : {&keys, &values, &queries})
            for (pool *one : *all)
                delete one;
        delete device_frequencies;
    }
};

static std::vector<int32_t> permutation(random_source &random, int64_t n)
{
    std::vector<int32_t> all((size_t)n);
    for (int64_t i = 0; i < n; i++)
        all[(size_t)i] = (int32_t)i;
    for (int64_t i = n - 1; i > 0; i--)
        std::swap(all[(size_t)i], all[(size_t)random.below(i + 1)]);
    return all;
}

/* Of a cache: -0 now and then. */
static float element(random_source &random)
{
    return random.below(30) == 0 ? -0.0f : random.normal();
}

static boundary *make_boundary(random_source &random)
{
    boundary *made = new boundary;
    boundary &b = *made;
    const bool is_long = random.below(20) == 0; /* more than 99 KiB of shared memory hold */
    b.num_layers = is_long ? 1 : (int32_t)random.one_of({1, 1, 2, 3});
    b.num_kv_heads = is_long ? 1 : (int32_t)random.one_of({1, 2, 3});
    b.group = is_long ? 1 : (int32_t)random.one_of({1, 2, 3, 4, 7, 8});
    b.head_dim = (int32_t)random.one_of({6, 16, 20, 64, 64, 96, 128, 128, 256, 9});
    b.dtype = random.one_of({BTX_F32, BTX_F16, BTX_BF16, BTX_BF16});
    b.top_k = (int32_t)random.one_of({0, 1, 5, 32, 77, 300});
    const int64_t recent_window = is_long ? 3 : random.one_of({1, 9, 16, 33, 96, 96});
    const int64_t num_steps = 1 + random.below(3);
    int64_t longest = 0;
    b.plan = btx_plan{};
    for (int64_t s = 0; s < num_steps; s++) {
        btx_plan_step step = {};
        const int64_t length = 1 + random.below(is_long ? 3 : random.one_of({3, 40, 120, 200}));
        step.sequence = num_steps - 1 - s; /* another order than the tables' */
        step.sequence_begin = random.one_of({0, 0, 3, 37});
        step.num_window = std::min(length, recent_window);
        step.num_prior = length - step.num_window + random.below(random.one_of({1, 60, 230, 230, 700}));
        step.num_prior += is_long && s == 0 ? 24400 + random.below(300) : 0;
        step.window_begin = step.sequence_begin + step.num_prior;
        step.step_end = step.window_begin + step.num_window;
        step.num_recalled = std::min<int64_t>(b.top_k, step.num_prior);
        step.prior_offset = b.plan.total_prior;
        step.row_offset = b.plan.total_rows;
        b.plan.total_prior += step.num_prior;
        b.plan.total_rows += step.num_recalled + step.num_window;
        longest = std::max(longest, step.step_end);
        b.steps.push_back(step);
    }
    b.block_size = random.one_of({1, 3, 16, 32, 0});
    b.block_size = b.block_size == 0 ? longest + random.below(3) : b.block_size;
    b.page_size = random.one_of<int64_t>({1, 7, 16, 0});
    b.page_size = b.page_size == 0 ? recent_window : b.page_size;
    b.pages_per_sequence = (recent_window + b.page_size - 1) / b.page_size + random.below(2);
    b.max_blocks = (longest + b.block_size - 1) / b.block_size;
    const int64_t num_blocks = num_steps * b.max_blocks + random.below(3), num_pages = num_steps * b.pages_per_sequence;
    b.block_table = permutation(random, num_blocks);
    b.block_table.resize((size_t)(num_steps * b.max_blocks));
    b.query_table = permutation(random, num_pages);
    const int64_t query_heads = b.num_kv_heads * b.group;
    const float spread = random.one_of({0.3f, 1.0f, 2.0f}); /* of scores, times sqrt(head_dim) */
    for (int32_t layer = 0; layer < b.num_layers; layer++) {
        b.keys.push_back(make_pool(random, b.dtype, num_blocks, b.block_size, b.num_kv_heads, b.head_dim));
        b.values.push_back(make_pool(random, b.dtype, num_blocks, b.block_size, b.num_kv_heads, b.head_dim));
        b.queries.push_back(make_pool(random, b.dtype, num_pages, b.page_size, query_heads, b.head_dim));
        for (const btx_plan_step &step : b.steps) {
            for (int64_t p = step.sequence_begin; p < step.step_end; p++) {
                for (int64_t head = 0; head < b.num_kv_heads; head++) {
                    for (int64_t i = 0; i < b.head_dim; i++) {
                        b.keys.back()->set(b.block(step, p), p % b.block_size, head, i, element(random));
                        b.values.back()->set(b.block(step, p), p % b.block_size, head, i, element(random));
                    }
                }
            }
            for (int64_t p = step.window_begin; p < step.step_end; p++)
                for (int64_t head = 0; head < query_heads; head++)
                    for (int64_t i = 0; i < b.head_dim; i++)
                        b.queries.back()->set(b.page(step, p), p % b.page_size, head, i, random.normal() * spread);
        }
        for (pool *one : {b.keys.back(), b.values.back(), b.queries.back()})
            one->device.upload(one->host.data());
        b.key_views.push_back(b.keys.back()->view);
        b.value_views.push_back(b.values.back()->view);
        b.query_views.push_back(b.queries.back()->view);
    }
    for (const btx_plan_step &step : b.steps) { /* what is of no token has no block */
        for (int64_t i = 0; i < b.max_blocks; i++)
            if (i < step.sequence_begin / b.block_size || i > (step.step_end - 1) / b.block_size)
                b.block_table[(size_t)(step.sequence * b.max_blocks + i)] = -1;
    }
    if (b.head_dim % 2 == 0 && random.below(2)) {
        for (int32_t i = 0; i < b.head_dim / 2; i++)
            b.inverse_frequencies.push_back(powf(10000.0f, -2.0f * (float)i / (float)b.head_dim));
        b.device_frequencies = new memory(b.inverse_frequencies);
    }
    b.plan.steps = b.steps.data();
    b.plan.num_steps = num_steps;
    b.plan.keys = b.key_views.data();
    b.plan.values = b.value_views.data();
    b.plan.queries = b.query_views.data();
    b.plan.block_table = b.block_table.data();
    b.plan.block_table_stride = b.max_blocks;
    b.plan.query_table = b.query_table.data();
    b.plan.query_table_stride = b.plan.pages_per_sequence = b.pages_per_sequence;
    b.plan.block_size = b.block_size;
    b.plan.page_size = b.page_size;
    b.plan.num_layers = b.num_layers;
    b.plan.num_kv_heads = b.num_kv_heads;
    b.plan.num_query_heads = (int32_t)query_heads;
    b.plan.head_dim = b.head_dim;
    b.plan.softmax_scale = 1.0f / sqrtf((float)b.head_dim);
    b.plan.rope_inv_freq = b.device_frequencies != nullptr ? b.device_frequencies->floats() : nullptr;
    return made;
}

/* ---- the plain arithmetic -------------------------------------------------------------------------------------------
 */

/* Attention mass [num_prior] of one step and layer. */
static std::vector<double> reference_mass(const boundary &b, int32_t layer, const btx_plan_step &step)
{
    std::vector<double> mass((size_t)step.num_prior, 0.0), score;
    for (int64_t p = step.window_begin; p < step.step_end; p++) {
        for (int64_t head = 0; head < b.plan.num_query_heads; head++) {
            double largest = -INFINITY, sum = 0.0;
            score.assign((size_t)(p + 1 - step.sequence_begin), 0.0);
            for (size_t k = 0; k < score.size(); k++) {
                for (int64_t i = 0; i < b.head_dim; i++)
                    score[k] += b.query(layer, step, p, head, i) *
                                b.key(layer, step, step.sequence_begin + (int64_t)k, head / b.group, i);
                score[k] *= (double)b.plan.softmax_scale;
                largest = std::max(largest, score[k]);
            }
            for (double &s : score)
                sum += s = exp(s - largest);
            for (size_t k = 0; k < mass.size(); k++)
                mass[k] += score[k] / sum / (double)(step.num_window * b.plan.num_query_heads);
        }
    }
    return mass;
}

/* Positions of the count largest, ascending; ties to the smaller one, NaN as zero. */
static std::vector<int32_t> reference_top_k(std::vector<float> mass, int64_t count, int64_t first)
{
    std::vector<int32_t> order(mass.size());
    for (size_t i = 0; i < mass.size(); i++) {
        order[i] = (int32_t)i;
        mass[i] = mass[i] != mass[i] ? 0.0f : mass[i];
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t x, int32_t y) { return mass[(size_t)x] > mass[(size_t)y]; });
    order.resize((size_t)count);
    std::sort(order.begin(), order.end());
    for (int32_t &position : order)
        position += (int32_t)first;
    return order;
}

/* Turns the key half of a row by the angle of its token, which count from the first one, or back. */
static void rotate(const boundary &b, std::vector<double> &row, int64_t position, double direction)
{
    const int64_t half = b.head_dim / 2;
    for (int64_t head = 0; head < b.num_kv_heads && !b.inverse_frequencies.empty(); head++) {
        for (int64_t i = 0; i < half; i++) {
            const double angle = (double)((float)position * b.inverse_frequencies[(size_t)i]) * direction;
            double &x = row[(size_t)(head * b.head_dim + i)], &y = row[(size_t)(head * b.head_dim + i + half)];
            const double turned = x * cos(angle) - y * sin(angle);
            y = y * cos(angle) + x * sin(angle);
            x = turned;
        }
    }
}

/* A KV-token as cached. */
static std::vector<double> cached_row(const boundary &b, int32_t layer, const btx_plan_step &step, int64_t position)
{
    std::vector<double> row;
    for (int64_t head = 0; head < b.num_kv_heads; head++)
        for (int64_t i = 0; i < b.head_dim; i++)
            row.push_back(b.key(layer, step, position, head, i));
    for (int64_t head = 0; head < b.num_kv_heads; head++)
        for (int64_t i = 0; i < b.head_dim; i++)
            row.push_back(b.value(layer, step, position, head, i));
    return row;
}

/* ---- products: how operands are looked at, whose layout is the backend's
 * --------------------------------------------- */

static btx_pass pass;

static int64_t pass_layers(void)
{
    return pass.layer_end - pass.layer_begin;
}

/* Weights of all layers, packed and uploaded. */
struct packed_weights {
    std::vector<float> weight, bias; /* [num_layers, out_dim, in_dim], [num_layers, out_dim] or empty */
    memory *packed = nullptr, *device_bias = nullptr; /* Owned. */
    btx_linear linear;

    packed_weights(random_source &random, int64_t out_dim, int64_t in_dim, btx_dtype dtype, bool gated, bool with_bias)
    {
        const int64_t num_layers = pass.plan->num_layers;
        const size_t stride = (backend->packed_bytes(out_dim, in_dim, dtype, gated) + 63) / 64 * 64;
        std::vector<unsigned char> host(stride * (size_t)num_layers, 0xff);
        weight = normals(random, num_layers * out_dim * in_dim, 1.0f / sqrtf((float)in_dim));
        for (int64_t layer = 0; layer < num_layers; layer++)
            backend->pack(&weight[(size_t)(layer * out_dim * in_dim)], out_dim, in_dim, dtype, gated,
                          &host[stride * (size_t)layer]);
        packed = new memory(host);
        if (with_bias) {
            bias = normals(random, num_layers * out_dim, 1.0f);
            device_bias = new memory(bias);
        }
        linear = {packed->data, stride, with_bias ? device_bias->floats() : nullptr, in_dim, out_dim, dtype, gated};
    }
    packed_weights(const packed_weights &) = delete;
    ~packed_weights()
    {
        delete packed;
        delete device_bias;
    }
    double operator()(int64_t layer, int64_t out, int64_t in) const
    {
        return rounded(weight[(size_t)((layer * linear.out_dim + out) * linear.in_dim + in)], linear.dtype);
    }
};

/* An operand [layers, rows, dim] of the pass. */
static memory *make_operand(int64_t dim, btx_dtype dtype)
{
    return new memory(backend->operand_bytes(pass_layers() * btx_pass_rows(&pass), dim, dtype));
}

/* The operand is expected [layers of the pass, rows, dim], up to tolerance and to rounding it: looked at through a
 * product, whose error is compared with that of a single element at its place. */
static void check_operand(random_source &random, const char *name, const memory &operand,
                          const std::vector<double> &expected, int64_t dim, btx_dtype dtype, double tolerance)
{
    const int64_t rows = btx_pass_rows(&pass), out_dim = 9;
    packed_weights weights(random, out_dim, dim, dtype, false, false);
    memory out((size_t)(pass_layers() * rows * out_dim) * sizeof(float));
    btx_error error;
    must(backend->linear(&pass, &weights.linear, operand.data, 0, out.floats(), &error), error);
    const std::vector<float> found = out.download<float>();
    tolerance += dtype == BTX_BF16 ? 0x1p-8 : 0x1p-20;
    for (int64_t layer = 0; layer < pass_layers(); layer++) {
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t o = 0; o < out_dim; o++) {
                double sum = 0.0, squares = 0.0;
                for (int64_t i = 0; i < dim; i++) {
                    const double weight = weights(pass.layer_begin + layer, o, i);
                    const double product = rounded(expected[(size_t)((layer * rows + r) * dim + i)], dtype) * weight;
                    sum += product;
                    squares += product * product + 0.01 * weight * weight; /* elements are of size 1 or so */
                }
                const double got = found[(size_t)((layer * rows + r) * out_dim + o)];
                check(fabs(got - sum) <= tolerance * 4.0 * sqrt(squares) + 1e-30,
                      "%s: layer %d, row %d, product %d is %.9g, not %.9g", name, (int)layer, (int)r, (int)o, got, sum);
            }
        }
    }
}

static void test_products(random_source &random, btx_dtype dtype)
{
    const int64_t rows = btx_pass_rows(&pass), dim = random.one_of({1, 12, 24, 40, 100}), layers = pass_layers();
    const std::vector<float> x = normals(random, layers * rows * dim, 1.0f);
    const std::vector<float> norm_weight = normals(random, pass.plan->num_layers * dim, 1.0f);
    memory device_x(x), device_norm_weight(norm_weight);
    memory *operand = make_operand(dim, dtype);
    btx_error error;
    const std::vector<double> exact(x.begin(), x.end());
    must(backend->round(&pass, device_x.floats(), dim, dtype, operand->data, &error), error);
    check_operand(random, "round", *operand, exact, dim, dtype, dtype == BTX_BF16 ? -0x1p-9 : 0.0);

    { /* a product with bias, then once more on top of what is there */
        const int64_t out_dim = random.one_of({1, 5, 24, 130});
        packed_weights weights(random, out_dim, dim, dtype, false, true);
        memory out((size_t)(layers * rows * out_dim) * sizeof(float));
        must(backend->linear(&pass, &weights.linear, operand->data, 0, out.floats(), &error), error);
        must(backend->linear(&pass, &weights.linear, operand->data, 1, out.floats(), &error), error);
        const std::vector<float> found = out.download<float>();
        for (int64_t layer = 0; layer < layers; layer++) {
            for (int64_t r = 0; r < rows; r++) {
                for (int64_t o = 0; o < out_dim; o++) {
                    const double bias = weights.bias[(size_t)((pass.layer_begin + layer) * out_dim + o)];
                    double sum = bias, size = fabs(bias);
                    for (int64_t i = 0; i < dim; i++) {
                        const double product = rounded(exact[(size_t)((layer * rows + r) * dim + i)], dtype) *
                                               weights(pass.layer_begin + layer, o, i);
                        sum += product;
                        size += fabs(product);
                    }
                    const double got = found[(size_t)((layer * rows + r) * out_dim + o)];
                    check(fabs(got - 2.0 * sum) <= 1e-6 * size, "linear: layer %d, row %d, column %d is %.9g, not %.9g",
                          (int)layer, (int)r, (int)o, got, 2.0 * sum);
                }
            }
        }
    }
    { /* the gated half of an MLP */
        const int64_t width = random.one_of({1, 17, 40, 72});
        packed_weights weights(random, 2 * width, dim, dtype, true, false);
        memory *out = make_operand(width, dtype);
        std::vector<double> expected;
        must(backend->linear_swiglu(&pass, &weights.linear, operand->data, out->data, &error), error);
        for (int64_t at = 0; at < layers * rows; at++) {
            for (int64_t o = 0; o < width; o++) {
                double gate = 0.0, up = 0.0;
                for (int64_t i = 0; i < dim; i++) {
                    const double value = rounded(exact[(size_t)(at * dim + i)], dtype);
                    gate += value * weights(pass.layer_begin + at / rows, o, i);
                    up += value * weights(pass.layer_begin + at / rows, width + o, i);
                }
                expected.push_back(gate / (1.0 + exp(-gate)) * up);
            }
        }
        check_operand(random, "linear_swiglu", *out, expected, width, dtype, 2e-6);
        delete out;
    }
    std::vector<double> normed;
    for (int64_t at = 0; at < layers * rows; at++) {
        double squares = 0.0;
        for (int64_t i = 0; i < dim; i++)
            squares += exact[(size_t)(at * dim + i)] * exact[(size_t)(at * dim + i)];
        for (int64_t i = 0; i < dim; i++)
            normed.push_back(exact[(size_t)(at * dim + i)] / sqrt(squares / (double)dim + 1e-5) *
                             norm_weight[(size_t)((pass.layer_begin + at / rows) * dim + i)]);
    }
    must(backend->rms_norm(&pass, device_x.floats(), dim, device_norm_weight.floats(), 1e-5f, dtype, operand->data,
                           &error),
         error);
    check_operand(random, "rms_norm", *operand, normed, dim, dtype, 1e-6);
    delete operand;
}

static void test_attention(random_source &random, const boundary &b, btx_dtype dtype)
{
    const int64_t heads = random.one_of({1, 3, 4}), size = random.one_of({1, 4, 16, 24, 32, 64}), dim = heads * size;
    const int64_t rows = btx_pass_rows(&pass), layers = pass_layers();
    const std::vector<float> qkv = normals(random, layers * rows * 3 * dim, 1.0f);
    memory device_qkv(qkv);
    memory *operand = make_operand(dim, dtype);
    std::vector<double> expected((size_t)(layers * rows * dim), 0.0), score;
    btx_error error;
    must(backend->attention(&pass, device_qkv.floats(), dim, (int32_t)heads, dtype, operand->data, &error), error);
    for (int64_t layer = 0; layer < layers; layer++) {
        for (const btx_plan_step &step : b.steps) {
            const int64_t count = step.num_recalled + step.num_window;
            auto row = [&](int64_t r) { return &qkv[(size_t)((layer * rows + step.row_offset + r) * 3 * dim)]; };
            for (int64_t r = 0; r < count; r++) {
                for (int64_t head = 0; head < heads; head++) {
                    double largest = -INFINITY, sum = 0.0;
                    score.assign((size_t)count, 0.0);
                    for (int64_t k = 0; k < count; k++) {
                        for (int64_t i = head * size; i < (head + 1) * size; i++)
                            score[(size_t)k] += (double)row(r)[i] * (double)row(k)[dim + i] / sqrt((double)size);
                        largest = std::max(largest, score[(size_t)k]);
                    }
                    for (double &s : score)
                        sum += s = exp(s - largest);
                    for (int64_t k = 0; k < count; k++)
                        for (int64_t i = head * size; i < (head + 1) * size; i++)
                            expected[(size_t)((layer * rows + step.row_offset + r) * dim + i)] +=
                                score[(size_t)k] / sum * (double)row(k)[2 * dim + i];
                }
            }
        }
    }
    check_operand(random, "attention", *operand, expected, dim, dtype, 4e-6);
    delete operand;
}

/* Calls work as the core calls operations: the backend then knows what to wait for. */
template <typename Work> static void call(Work work)
{
    btx_error error;
    auto unit = [](void *context, int64_t, int32_t, btx_error *of_unit) { return (*(Work *)context)(of_unit); };
    must(backend->executor_run(executor, 1, unit, &work, &error), error);
}

static void mark(btx_stage stage)
{
    if (backend->mark != nullptr)
        backend->mark(executor, stage);
}

/* ---- selection, gathering, writing
 * ----------------------------------------------------------------------------------- */

static void test_mass(const boundary &b, const memory &mass, int32_t num_parts)
{
    const int64_t prior = b.plan.total_prior, longest = 3 + std::max<int64_t>(prior, 1);
    const std::vector<float> parts = mass.download<float>();
    memory stored((size_t)(b.num_layers * b.plan.num_steps * longest) * sizeof(float));
    const std::vector<float> nowhere((size_t)(b.num_layers * b.plan.num_steps * longest), NAN);
    const int64_t shape[3] = {b.num_layers, b.plan.num_steps, longest};
    btx_tensor out = btx_tensor_contiguous(stored.data, BTX_F32, 3, shape);
    btx_error error;
    stored.upload(nowhere.data());
    out.device.type = backend->device_type;
    must(backend->store_mass(&pass, num_parts, mass.floats(), &out, &error), error);
    const std::vector<float> found = stored.download<float>();
    for (int32_t layer = pass.layer_begin; layer < pass.layer_end; layer++) {
        for (size_t s = 0; s < b.steps.size(); s++) {
            const btx_plan_step &step = b.steps[s];
            const std::vector<double> expected = reference_mass(b, layer, step);
            for (int64_t i = 0; i < longest; i++) {
                const float got = found[((size_t)layer * b.steps.size() + s) * (size_t)longest + (size_t)i];
                float sum = 0.0f;
                if (i >= step.num_prior) {
                    check(got == 0.0f, "store_mass: layer %d, step %d, %g behind the prior", layer, (int)s,
                          (double)got);
                    continue;
                }
                for (int32_t part = 0; part < num_parts; part++)
                    sum += parts[(size_t)(((layer - pass.layer_begin) * num_parts + part) * prior + step.prior_offset +
                                          i)];
                check(got == sum, "store_mass: layer %d, step %d, position %d is %.9g, not %.9g", layer, (int)s, (int)i,
                      (double)got, (double)sum);
                check(fabs((double)got - expected[(size_t)i]) <= 3e-5 * expected[(size_t)i] + 1e-12,
                      "attention_mass: layer %d, step %d, position %d is %.9g, not %.9g", layer, (int)s, (int)i,
                      (double)got, expected[(size_t)i]);
            }
        }
    }
}

/* Overwrites mass. */
static void test_top_k(const boundary &b, const char *name, memory &mass, int32_t num_parts, const memory &positions)
{
    const std::vector<float> parts = mass.download<float>();
    const int64_t prior = b.plan.total_prior, rows = b.plan.total_rows;
    btx_error error;
    must(backend->top_k(&pass, num_parts, mass.floats(), (int32_t *)positions.data, &error), error);
    const std::vector<int32_t> found = positions.download<int32_t>();
    for (int64_t layer = 0; layer < pass_layers(); layer++) {
        for (size_t s = 0; s < b.steps.size(); s++) {
            const btx_plan_step &step = b.steps[s];
            std::vector<float> sums;
            for (int64_t i = 0; i < step.num_prior; i++) {
                float sum = parts[(size_t)(layer * num_parts * prior + step.prior_offset + i)];
                for (int32_t part = 1; part < num_parts; part++)
                    sum += parts[(size_t)((layer * num_parts + part) * prior + step.prior_offset + i)];
                sums.push_back(sum);
            }
            std::vector<int32_t> expected = reference_top_k(sums, step.num_recalled, step.sequence_begin);
            for (int64_t p = step.window_begin; p < step.step_end; p++)
                expected.push_back((int32_t)p);
            for (size_t i = 0; i < expected.size(); i++) {
                const int32_t got = found[(size_t)(layer * rows + step.row_offset) + i];
                check(got == expected[i], "%s: layer %d, step %d, row %d is position %d, not %d", name, (int)layer,
                      (int)s, (int)i, got, expected[i]);
            }
        }
    }
}

static void test_gather(random_source &random, const boundary &b, const memory &positions, btx_dtype dtype)
{
    const std::vector<int32_t> where = positions.download<int32_t>();
    const int64_t width = 2 * (int64_t)b.num_kv_heads * b.head_dim;
    const std::vector<float> weight = normals(random, b.num_layers * width, 1.0f);
    memory device_weight(weight);
    memory *operand = make_operand(width, dtype);
    memory rows((size_t)(pass_layers() * b.plan.total_rows * width) * sizeof(float));
    const bool wanted = backend->keeps_rows;
    std::vector<double> expected, plain;
    btx_error error;
    must(backend->gather_kv(&pass, (const int32_t *)positions.data, wanted ? rows.floats() : nullptr,
                            device_weight.floats(), 1e-6f, dtype, operand->data, &error),
         error);
    for (int64_t layer = 0; layer < pass_layers(); layer++) {
        for (const btx_plan_step &step : b.steps) {
            for (int64_t r = 0; r < step.num_recalled + step.num_window; r++) {
                const int32_t position = where[(size_t)(layer * b.plan.total_rows + step.row_offset + r)];
                std::vector<double> row = cached_row(b, pass.layer_begin + (int32_t)layer, step, position);
                double squares = 0.0;
                rotate(b, row, position - step.sequence_begin, -1.0);
                for (double x : row)
                    squares += x * x;
                for (size_t i = 0; i < row.size(); i++) {
                    plain.push_back(row[i]);
                    expected.push_back(row[i] / sqrt(squares / (double)width + 1e-6) *
                                       weight[(size_t)(pass.layer_begin + layer) * (size_t)width + i]);
                }
            }
        }
    }
    check_operand(random, "gather_kv", *operand, expected, width, dtype, 2e-6);
    if (wanted) {
        const std::vector<float> found = rows.download<float>();
        for (size_t i = 0; i < found.size(); i++)
            check(fabs((double)found[i] - plain[i]) <= 1e-5, "gather_kv: element %zu is %.9g, not %.9g", i,
                  (double)found[i], plain[i]);
    }
    delete operand;
}

/* Every byte of the caches is as the host has it. */
static void check_caches(const boundary &b, const char *what)
{
    for (const auto *all : {&b.keys, &b.values, &b.queries})
        for (size_t layer = 0; layer < all->size(); layer++)
            check((*all)[layer]->device.download<unsigned char>() == (*all)[layer]->host, "%s: %s of layer %zu differ",
                  what,
                  all == &b.keys     ? "keys"
                  : all == &b.values ? "values"
                                     : "queries",
                  layer);
}

/* An edit that is zero here and there. Leaves the host's caches as they must be afterwards. refuse: one edit is too
 * large, so nothing may be written. */
static void test_write(random_source &random, boundary &b, const memory &positions, bool refuse)
{
    const std::vector<int32_t> where = positions.download<int32_t>();
    const int64_t width = 2 * (int64_t)b.num_kv_heads * b.head_dim, rows = b.plan.total_rows, layers = pass_layers();
    std::vector<float> delta = normals(random, layers * rows * width, 1.0f), gate = normals(random, b.num_layers, 0.5f);
    for (float &x : delta)
        x = random.below(50) == 0 ? (random.below(2) ? 0.0f : -0.0f) : x;
    if (refuse)
        delta[(size_t)random.below((int64_t)delta.size())] = random.one_of({INFINITY, NAN});
    memory device_delta(delta), device_gate(gate);
    memory staged((size_t)(layers * rows * width) * btx_dtype_size(b.dtype));
    memory delta_norm((size_t)(layers * b.plan.num_steps) * sizeof(float));
    memory row_norm((size_t)(layers * b.plan.num_steps) * sizeof(float));
    btx_error error;
    call([&](btx_error *told) {
        const btx_status status =
            backend->stage_kv(&pass, (const int32_t *)positions.data, device_gate.floats(), nullptr,
                              device_delta.floats(), staged.data, delta_norm.floats(), row_norm.floats(), told);
        mark(BTX_STAGE_PROCESSOR);
        return status;
    });
    call([&](btx_error *told) {
        const btx_status status = backend->write_kv(&pass, (const int32_t *)positions.data, staged.data, told);
        mark(BTX_STAGE_WRITE);
        return status;
    });
    double seconds[BTX_NUM_STAGES] = {0};
    const btx_status status = backend->synchronize(executor, seconds, &error);
    check(status == (refuse ? BTX_INVALID_ARGUMENT : BTX_OK), "synchronize: %d, %s", (int)status,
          status == BTX_OK ? "" : error.message);
    if (refuse) {
        check_caches(b, "refused");
        return;
    }
    const std::vector<float> norms = delta_norm.download<float>(), row_norms = row_norm.download<float>();
    for (int64_t layer = 0; layer < layers; layer++) {
        const int32_t of_model = pass.layer_begin + (int32_t)layer;
        std::vector<unsigned char> keys = b.keys[(size_t)of_model]->device.download<unsigned char>();
        std::vector<unsigned char> values = b.values[(size_t)of_model]->device.download<unsigned char>();
        for (size_t s = 0; s < b.steps.size(); s++) {
            const btx_plan_step &step = b.steps[s];
            double edit_squares = 0.0, row_squares = 0.0;
            for (int64_t r = 0; r < step.num_recalled + step.num_window; r++) {
                const int64_t at = layer * rows + step.row_offset + r;
                const int32_t position = where[(size_t)at];
                const std::vector<double> old = cached_row(b, of_model, step, position);
                std::vector<double> edit, exact_old = old;
                for (int64_t i = 0; i < width; i++)
                    edit.push_back((double)delta[(size_t)(at * width + i)] * (double)gate[(size_t)of_model]);
                rotate(b, edit, position - step.sequence_begin, 1.0);
                rotate(b, exact_old, position - step.sequence_begin, -1.0);
                for (int64_t i = 0; i < width; i++) {
                    const bool is_value = i >= width / 2;
                    pool &cache = *(is_value ? b.values : b.keys)[(size_t)of_model];
                    const int64_t in_cache = cache.at(b.block(step, position), position % b.block_size,
                                                      i % (width / 2) / b.head_dim, i % b.head_dim);
                    const std::vector<unsigned char> &now = is_value ? values : keys;
                    const double got = get(now.data(), b.dtype, in_cache), want = old[(size_t)i] + edit[(size_t)i];
                    const double ulp = b.dtype == BTX_F32 ? 0x1p-23 : b.dtype == BTX_F16 ? 0x1p-11 : 0x1p-8;
                    check(fabs(got - want) <= fabs(want) * ulp * 1.001 + 1e-6,
                          "stage_kv or write_kv: layer %d, position %d, column %d is %.9g, not %.9g", of_model,
                          position, (int)i, got, want);
                    if (edit[(size_t)i] == 0.0)
                        check(memcmp(&now[(size_t)in_cache * btx_dtype_size(b.dtype)],
                                     &cache.host[(size_t)in_cache * btx_dtype_size(b.dtype)],
                                     btx_dtype_size(b.dtype)) == 0,
                              "a zero edit changed layer %d, position %d, column %d", of_model, position, (int)i);
                    put(cache.host.data(), b.dtype, in_cache, (float)got); /* for check_caches */
                    edit_squares += edit[(size_t)i] * edit[(size_t)i];
                    row_squares += exact_old[(size_t)i] * exact_old[(size_t)i];
                }
            }
            const double norm = norms[(size_t)layer * b.steps.size() + s],
                         size = row_norms[(size_t)layer * b.steps.size() + s];
            check(fabs(norm - sqrt(edit_squares)) <= 1e-5 * sqrt(edit_squares), "delta_norm %.9g, not %.9g", norm,
                  sqrt(edit_squares));
            check(fabs(size - sqrt(row_squares)) <= 1e-5 * sqrt(row_squares), "row_norm %.9g, not %.9g", size,
                  sqrt(row_squares));
        }
    }
    check_caches(b, "written");
}

static void begin(const boundary &b)
{
    btx_error error;
    if (backend->begin != nullptr)
        must(backend->begin(executor, &b.plan, nullptr, 1, &error), error);
}

static void test_boundary(random_source &random, boundary &b, int32_t layer_begin, int32_t layer_end)
{
    const int32_t num_parts = backend->mass_by_head ? b.num_kv_heads : 1;
    const int64_t max_dim = 3 * 256;
    memory scratch(backend->scratch_bytes(&b.plan, layer_end - layer_begin, b.plan.total_rows, max_dim));
    pass = {&b.plan, layer_begin, layer_end, 0, b.plan.num_steps, executor, scratch.data};
    const size_t num_masses = (size_t)((layer_end - layer_begin) * num_parts * b.plan.total_prior);
    memory mass(num_masses * sizeof(float)), odd_mass(num_masses * sizeof(float));
    memory positions((size_t)((layer_end - layer_begin) * b.plan.total_rows) * sizeof(int32_t));
    const btx_dtype weight_dtype = random.one_of({BTX_F32, BTX_BF16});
    btx_error error;

    begin(b);
    must(backend->attention_mass(&pass, 0, b.num_kv_heads, mass.floats(), &error), error);
    test_mass(b, mass, num_parts);
    mark(BTX_STAGE_MASS);
    std::vector<float> odd(num_masses);
    for (float &x : odd)
        x = random.one_of({0.0f, -0.0f, 1e-40f, 0.25f, 0.25f, 0.5f, 1e-7f, NAN});
    odd_mass.upload(odd.data());
    test_top_k(b, "top_k, ties", odd_mass, num_parts, positions);
    test_top_k(b, "top_k", mass, num_parts, positions);
    mark(BTX_STAGE_TOP_K);
    test_gather(random, b, positions, weight_dtype);
    mark(BTX_STAGE_GATHER);
    test_products(random, weight_dtype);
    test_attention(random, b, weight_dtype);
    test_write(random, b, positions, false);

    begin(b);
    test_write(random, b, positions, true);
    if (b.plan.total_prior > 0) { /* a query that was never captured */
        size_t longest = 0;
        for (size_t s = 0; s < b.steps.size(); s++)
            longest = b.steps[s].num_prior > b.steps[longest].num_prior ? s : longest;
        pool &queries = *b.queries[(size_t)layer_begin];
        const btx_plan_step &step = b.steps[longest];
        const int64_t p = step.window_begin + random.below(step.num_window);
        queries.set(b.page(step, p), p % b.page_size, random.below(b.plan.num_query_heads), random.below(b.head_dim),
                    NAN);
        queries.device.upload(queries.host.data());
        begin(b);
        call([&](btx_error *told) {
            const btx_status measured = backend->attention_mass(&pass, 0, b.num_kv_heads, mass.floats(), told);
            if (measured != BTX_OK)
                return measured;
            return backend->top_k(&pass, num_parts, mass.floats(), (int32_t *)positions.data, told);
        });
        const btx_status status = backend->synchronize(executor, nullptr, &error);
        check(status == BTX_INVALID_ARGUMENT, "NaN in a query was not refused: %d", (int)status);
        must(backend->synchronize(executor, nullptr, &error), error); /* told once */
        for (int64_t head = 0; head < b.plan.num_query_heads; head++)
            for (int64_t i = 0; i < b.head_dim; i++)
                queries.set(b.page(step, p), p % b.page_size, head, i, 0.5f);
        queries.device.upload(queries.host.data());
    }
}

/* ---- query capture --------------------------------------------------------------------------------------------------
 */

/* i32 or i64 numbers, stride apart, behind and before others that must not be looked at. */
template <typename T> struct numbers {
    memory device;
    btx_tensor view;

    numbers(const std::vector<T> &all, T elsewhere, int64_t stride) : device((all.size() + 2) * stride * sizeof(T))
    {
        std::vector<T> host((all.size() + 2) * (size_t)stride, elsewhere);
        for (size_t i = 0; i < all.size(); i++)
            host[(i + 1) * (size_t)stride] = all[i];
        device.upload(host.data());
        const int64_t shape[1] = {(int64_t)all.size()};
        view = btx_tensor_contiguous((T *)device.data + stride, sizeof(T) == 8 ? BTX_I64 : BTX_I32, 1, shape);
        view.device.type = backend->device_type;
        view.stride[0] = stride;
    }
};

/* Tokens in random order to random rows of pages; some have no slot, some blocks no page, and some of both do not
 * exist. Exactly the rows of the others are written. */
static void test_capture(random_source &random, btx_dtype dtype)
{
    const int64_t head_dim = random.one_of({1, 7, 8, 20, 64, 96, 128}), heads = random.one_of({1, 3, 5, 12});
    const int64_t page_size = random.one_of({1, 3, 16}), num_blocks = 1 + random.below(9);
    const int64_t num_pages = 1 + random.below(num_blocks), num_tokens = random.below(num_blocks * page_size + 1);
    const int64_t num_slots = num_tokens - std::min<int64_t>(num_tokens, random.below(3)); /* the rest is padding */
    const int64_t gap = random.one_of({0, 0, 3, 8}), token = heads * head_dim + gap;
    /* One page more than the view tells of: it is there, but not to be written. */
    pool *pages = make_pool(random, dtype, num_pages + 1, page_size, heads, head_dim), *query;
    if (random.below(2)) {
        query = make_pool(random, dtype, 1, num_tokens + 1, heads, head_dim);
    }
    else {
        const int64_t shape[4] = {1, num_tokens + 1, heads, head_dim};
        const int64_t stride[4] = {(num_tokens + 1) * token, token, head_dim, 1};
        query = new pool(dtype, shape, stride, 0, (num_tokens + 1) * token);
    }
    for (int64_t i = 0; i < num_tokens; i++)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t c = 0; c < head_dim; c++)
                query->set(0, i, head, c, random.normal());
    query->device.upload(query->host.data());
    pages->device.upload(pages->host.data());

    std::vector<int32_t> page_of, rows = permutation(random, num_blocks * page_size);
    std::vector<int64_t> slots;
    for (int32_t block : permutation(random, num_blocks)) /* num_pages of them have a page, two at most a wrong one */
        page_of.push_back(block < num_pages        ? block
                          : block == num_pages     ? (int32_t)num_pages
                          : block == num_pages + 1 ? INT32_MAX
                                                   : -1 - (int32_t)random.below(3));
    for (int64_t i = 0; i < num_slots; i++) {
        const int64_t kind = random.below(8);
        slots.push_back(kind == 0   ? -1 - random.below(page_size)
                        : kind == 1 ? num_blocks * page_size + random.below(page_size)
                                    : rows[(size_t)i]);
    }
    numbers<int64_t> device_slots(slots, 0, 1 + random.below(2));
    numbers<int32_t> device_page_of(page_of, 0, 1 + random.below(2));

    const int64_t shape[3] = {num_tokens, heads, head_dim};
    btx_tensor query_view = query->view, page_view = pages->view;
    query_view.num_dims = 3;
    memcpy(query_view.shape, shape, sizeof shape);
    memcpy(query_view.stride, query->view.stride + 1, 3 * sizeof *query_view.stride);
    page_view.shape[0] = num_pages;
    btx_error error;
    must(
        backend->capture_queries(0, &query_view, &device_slots.view, &device_page_of.view, &page_view, nullptr, &error),
        error);

    for (size_t i = 0; i < slots.size(); i++) {
        const int64_t block = slots[i] / page_size;
        if (slots[i] < 0 || block >= num_blocks || page_of[(size_t)block] < 0 || page_of[(size_t)block] >= num_pages)
            continue;
        for (int64_t head = 0; head < heads; head++)
            for (int64_t c = 0; c < head_dim; c++)
                pages->set(page_of[(size_t)block], slots[i] % page_size, head, c,
                           (float)(*query)(0, (int64_t)i, head, c));
    }
    check(pages->device.download<unsigned char>() == pages->host,
          "capture_queries: %d of %d tokens with slots, %d heads of %d %s, %d of %d blocks with pages of %d",
          (int)num_slots, (int)num_tokens, (int)heads, (int)head_dim, btx_dtype_name(dtype), (int)num_pages,
          (int)num_blocks, (int)page_size);
    check(query->device.download<unsigned char>() == query->host, "capture_queries wrote the queries");
    delete pages;
    delete query;
}

/* Of a call of as many stages as there can be, two each for the selection and for the unit of every layer. */
static void test_marks(void)
{
    random_source random = {1};
    double seconds[BTX_NUM_STAGES] = {};
    btx_error error;
    boundary *b = make_boundary(random);
    begin(*b);
    for (int i = 0; i < 2 * 4096; i++)
        mark(i % 2 == 0 ? BTX_STAGE_MASS : BTX_STAGE_TOP_K);
    for (int i = 0; i < 2 * 4096; i++)
        mark(i % 2 == 0 ? BTX_STAGE_GATHER : BTX_STAGE_PROCESSOR);
    mark(BTX_STAGE_WRITE);
    must(backend->executor_run(executor, 0, nullptr, nullptr, &error), error);
    if (backend->mark != nullptr)
        must(backend->synchronize(executor, seconds, &error), error);
    for (int stage = 0; backend->mark != nullptr && stage < BTX_NUM_STAGES; stage++)
        check(seconds[stage] > 0.0, "no time of stage %d", stage);
    delete b;
}

int main(int count, char **arguments)
{
    const long first = count > 1 ? atol(arguments[1]) : 0, number = count > 2 ? atol(arguments[2]) : 20;
    const bool stop = count > 3 && atol(arguments[3]) != 0;
    btx_error error;
    if (!backend->available()) {
        printf("no device\n");
        return 3;
    }
    must(backend->executor_create(0, 1, &executor, &error), error);
    test_marks();
    for (long seed = first; seed < first + number && !(stop && num_failures > 0); seed++) {
        random_source random = {(uint64_t)seed * 1000003};
        boundary *b = make_boundary(random);
        char text[512];
        snprintf(
            text, sizeof text,
            "seed %ld: %d layers, %d KV heads, group %d, head_dim %d, %s, top_k %d, block_size %d, page_size %d, %s,",
            seed, b->num_layers, b->num_kv_heads, b->group, b->head_dim, btx_dtype_name(b->dtype), b->top_k,
            (int)b->block_size, (int)b->page_size, b->inverse_frequencies.empty() ? "rotated" : "unrotated");
        description = text;
        for (const btx_plan_step &step : b->steps) {
            snprintf(text, sizeof text, " %d + %d + %d", (int)step.sequence_begin, (int)step.num_prior,
                     (int)step.num_window);
            description += text;
        }
        const int64_t failed = num_failures;
        if (random.below(2)) {
            test_boundary(random, *b, 0, b->num_layers);
        }
        else {
            for (int32_t layer = 0; layer < b->num_layers; layer++)
                test_boundary(random, *b, layer, layer + 1);
        }
        for (int i = 0; i < 8; i++)
            test_capture(random, b->dtype);
        delete b;
        if (num_failures > failed)
            printf("%s: %lld checks failed\n", description.c_str(), (long long)(num_failures - failed));
        fflush(stdout);
    }
    backend->executor_destroy(executor);
    printf("%lld checks, %lld failed\n", (long long)num_checks, (long long)num_failures);
    return num_failures != 0;
}
